//! A Kafka cluster that can go away and come back: librdkafka's own mock cluster, in a Python beside the test.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use parking_lot::Mutex;

/// A cluster with a topic `audit`; it is gone when dropped.
pub struct Kafka {
    child: Child,
    answers: Mutex<BufReader<ChildStdout>>,
    /// The addresses of its brokers.
    pub brokers: Vec<String>,
}

/// A message as the topic has it.
#[derive(Clone, Debug)]
pub struct Stored {
    /// The partition that it is in.
    pub partition: i32,
    /// Its key.
    pub key: String,
    /// Its value.
    pub value: String,
}

impl Kafka {
    /// A cluster of so many brokers, and so many partitions.
    pub fn start(brokers: u32, partitions: u32) -> Self {
        let python = std::env::var("KAFKA_PYTHON").unwrap_or_else(|_| "target/clients/kafka/bin/python".to_owned());
        let mut child = Command::new(python)
            .args(["tests/support/kafka.py", &brokers.to_string(), &partitions.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the Python package confluent-kafka is missing: tests/run --kafka installs it");
        let mut answers = BufReader::new(child.stdout.take().unwrap());
        let brokers = line(&mut answers).split(',').map(str::to_owned).collect();
        Self { child, answers: Mutex::new(answers), brokers }
    }

    /// All brokers are gone; what they hold stays.
    pub fn down(&self) {
        self.tell("down");
    }

    /// They are back.
    pub fn up(&self) {
        self.tell("up");
    }

    /// Another broker, counted from 1, leads a partition.
    pub fn lead(&self, partition: i32, broker: u32) {
        self.tell(&format!("leader {partition} {broker}"));
    }

    /// The next batch is answered with this error of Kafka's protocol.
    pub fn answer(&self, error: u32) {
        self.tell(&format!("error {error}"));
    }

    /// Everything in the topic, a partition's messages in their order.
    pub fn stored(&self) -> Vec<Stored> {
        let all: Vec<(i32, String, String)> = serde_json::from_str(&self.tell("read")).unwrap();
        all.into_iter().map(|(partition, key, value)| Stored { partition, key, value }).collect()
    }

    fn tell(&self, command: &str) -> String {
        let mut answers = self.answers.lock();
        writeln!(self.child.stdin.as_ref().unwrap(), "{command}").unwrap();
        line(&mut answers)
    }
}

impl Drop for Kafka {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn line(answers: &mut BufReader<ChildStdout>) -> String {
    let mut line = String::new();
    answers.read_line(&mut line).unwrap();
    assert!(line.ends_with('\n'), "the cluster broke down: is confluent-kafka there? tests/run --kafka installs it");
    line.trim().to_owned()
}
