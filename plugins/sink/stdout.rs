//! Lines on the standard output, for what collects containers' output.

use schemars::JsonSchema;
use serde::Deserialize;

use super::{Batch, Delivery, Sink, Way, text};

/// Lines on the standard output.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "StdoutSink")]
#[serde(deny_unknown_fields)]
pub struct Config {}

#[derive(Debug)]
pub(super) struct Stdout;

pub(super) fn build(_: &Config) -> Stdout {
    Stdout
}

impl Sink for Stdout {
    fn kind(&self) -> &'static str {
        "stdout"
    }

    fn way(&self) -> Way<'_> {
        Way::Stdout
    }

    fn delivery(&self, batch: &Batch<'_>) -> Delivery {
        Delivery::Text(text(batch.lines))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::tests::batch;

    #[test]
    fn lines_leave_as_they_are() {
        let delivery = Stdout.delivery(&batch(&[b"a", b"b"]));
        assert_eq!(delivery, Delivery::Text("a\nb\n".into()));
    }
}
