//! The way from requests to the background: what they hand over waits in a line that has an end, and one takes it from there.
//!
//! The background's runtime may wait for names and connections; threads that carry requests never do.

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// A line of jobs.
#[derive(Debug)]
pub struct Handover<J> {
    jobs: mpsc::Sender<J>,
    taking: Mutex<Option<mpsc::Receiver<J>>>,
}

impl<J> Handover<J> {
    /// A line in which so many may wait.
    pub fn of(waiting: usize) -> Self {
        let (jobs, taking) = mpsc::channel(waiting);
        Self { jobs, taking: Mutex::new(Some(taking)) }
    }

    /// Hands a job over. Returns whether there was room for it.
    pub fn give(&self, job: J) -> bool {
        self.jobs.try_send(job).is_ok()
    }

    /// Works on all that is handed over, so many `at_once`, until the process ends. Whoever asks first is who takes it.
    pub async fn each<F>(&self, at_once: usize, work: impl Fn(J) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let Some(mut jobs) = self.taking.lock().take() else { return };
        let mut running = JoinSet::new();
        loop {
            tokio::select! {
                job = jobs.recv(), if running.len() < at_once => match job {
                    Some(job) => drop(running.spawn(work(job))),
                    None => return,
                },
                Some(_) = running.join_next() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::oneshot;

    use super::*;

    /// A job: it says that it has begun, and ends when it hears so.
    type Job = (oneshot::Sender<()>, oneshot::Receiver<()>);

    #[tokio::test]
    async fn so_many_run_at_once_so_many_wait_and_the_rest_is_not_taken() {
        let line = Arc::new(Handover::<Job>::of(1));
        let taking = line.clone();
        let taker = tokio::spawn(async move {
            let work = |(begun, ends): Job| async move {
                let _heard = (begun.send(()), ends.await);
            };
            taking.each(1, work).await;
        });
        let job = || {
            let ((begun, begins), (end, ends)) = (oneshot::channel(), oneshot::channel());
            (line.give((begun, ends)), begins, end)
        };
        let (taken, begins, end) = job();
        begins.await.unwrap();
        let (waits, mut begins, _end) = job();
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        let (third, ..) = job();
        assert_eq!((taken, waits, third), (true, true, false));
        assert!(begins.try_recv().is_err(), "one at once");
        end.send(()).unwrap();
        begins.await.unwrap();
        taker.abort();
    }
}
