//! Numbers that plugins give to operators.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use wasmqtt_protocol::text::is_unsafe;

/// Series of one plugin: a name with its labels.
const SERIES_MAX: usize = 200;
/// Bytes of a name with its labels.
pub(crate) const NAME_BYTES_MAX: usize = 1024;
/// Upper bounds of the buckets of a histogram.
const BUCKETS: [f64; 25] = [
    1e-6, 1e-5, 1e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0,
    500.0, 1e3, 1e4, 1e5, 1e6,
];

/// A value of a metric.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Value {
    /// Only grows.
    Counter {
        /// Sum of all that was added.
        value: f64,
    },
    /// As it was set last.
    Gauge {
        /// That value.
        value: f64,
    },
    /// How values are spread.
    Histogram {
        /// How many.
        count: u64,
        /// Their sum.
        sum: f64,
        /// How many are at most so large: pairs of bound and number, only where the number changes.
        buckets: Vec<(f64, u64)>,
    },
}

#[derive(Debug)]
enum Series {
    Counter(f64),
    Gauge(f64),
    Histogram { counts: Box<[u64; BUCKETS.len() + 1]>, sum: f64 },
}

/// All metrics of one plugin.
#[derive(Default)]
pub(crate) struct Metrics(Mutex<Registry>);

#[derive(Default)]
struct Registry {
    series: BTreeMap<String, Series>,
    lost: u64,
}

/// What is done to a series.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Count,
    Gauge,
    Observe,
}

impl Metrics {
    /// `name` has the labels in it: `name{label="value"}`.
    pub(crate) fn record(&self, kind: Kind, name: String, value: f64) {
        let mut registry = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !value.is_finite()
            || name.len() > NAME_BYTES_MAX
            || name.chars().any(is_unsafe)
            || (kind == Kind::Count && value < 0.0)
        {
            registry.lost += 1;
            return;
        }
        if registry.series.len() >= SERIES_MAX && !registry.series.contains_key(&name) {
            registry.lost += 1;
            return;
        }
        let series = registry.series.entry(name).or_insert_with(|| match kind {
            Kind::Count => Series::Counter(0.0),
            Kind::Gauge => Series::Gauge(0.0),
            Kind::Observe => Series::Histogram { counts: Box::new([0; BUCKETS.len() + 1]), sum: 0.0 },
        });
        match (kind, series) {
            (Kind::Count, Series::Counter(total)) => *total += value,
            (Kind::Gauge, Series::Gauge(last)) => *last = value,
            (Kind::Observe, Series::Histogram { counts, sum }) => {
                counts[BUCKETS.partition_point(|bound| *bound < value)] += 1;
                *sum += value;
            }
            // One name, two kinds: the first counts.
            _ => registry.lost += 1,
        }
    }

    /// A value that is not recorded.
    pub(crate) fn lose(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).lost += 1;
    }

    /// Values that were not recorded: too many series, or no number.
    pub(crate) fn lost(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).lost
    }

    pub(crate) fn snapshot(&self) -> BTreeMap<String, Value> {
        let registry = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        registry.series.iter().map(|(name, series)| (name.clone(), series.value())).collect()
    }
}

impl Series {
    fn value(&self) -> Value {
        match self {
            Self::Counter(value) => Value::Counter { value: *value },
            Self::Gauge(value) => Value::Gauge { value: *value },
            Self::Histogram { counts, sum } => {
                let mut below = 0;
                let bounds = BUCKETS.iter().copied().chain(std::iter::once(f64::INFINITY));
                let buckets = bounds.zip(counts.iter()).filter(|(_, count)| **count > 0).map(|(bound, count)| {
                    below += count;
                    (bound, below)
                });
                let buckets = buckets.collect();
                Value::Histogram { count: counts.iter().sum(), sum: *sum, buckets }
            }
        }
    }
}

/// `name{label="value",…}`, with quotes and control characters escaped.
pub(crate) fn series_name<'a>(name: &str, labels: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let labels: Vec<String> = labels.map(|(label, value)| format!("{label}={value:?}")).collect();
    if labels.is_empty() { name.to_owned() } else { format!("{name}{{{}}}", labels.join(",")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_add_gauges_set_and_histograms_spread() {
        let metrics = Metrics::default();
        for value in [1.0, 2.0, f64::NAN, -1.0] {
            metrics.record(Kind::Count, "c".into(), value);
            metrics.record(Kind::Gauge, "g".into(), value);
            metrics.record(Kind::Observe, "h".into(), value);
        }
        let snapshot = metrics.snapshot();
        assert_eq!(snapshot["c"], Value::Counter { value: 3.0 });
        assert_eq!(snapshot["g"], Value::Gauge { value: -1.0 });
        let Value::Histogram { count, sum, buckets } = &snapshot["h"] else { panic!("{snapshot:?}") };
        assert_eq!((*count, *sum, buckets.last()), (3, 2.0, Some(&(2.0, 3))));
        assert_eq!(metrics.lost(), 4);
    }

    #[test]
    fn series_are_bounded() {
        let metrics = Metrics::default();
        for n in 0..1000 {
            metrics.record(Kind::Count, format!("c{n}"), 1.0);
        }
        metrics.record(Kind::Count, "c0".into(), 1.0);
        assert_eq!((metrics.snapshot().len(), metrics.lost()), (SERIES_MAX, 1000 - SERIES_MAX as u64));
        let metrics = Metrics::default();
        for bytes in [NAME_BYTES_MAX, NAME_BYTES_MAX + 1] {
            metrics.record(Kind::Count, "n".repeat(bytes), 1.0);
        }
        assert_eq!((metrics.snapshot().len(), metrics.lost()), (1, 1));
    }

    #[test]
    fn names_that_a_terminal_would_obey_are_not_recorded() {
        let metrics = Metrics::default();
        metrics.record(Kind::Count, "a\u{1b}[31m".into(), 1.0);
        metrics.record(Kind::Count, series_name("a", [("label", "\u{1b}")].into_iter()), 1.0);
        assert_eq!((metrics.snapshot().len(), metrics.lost()), (1, 1), "values of labels are escaped");
    }

    #[test]
    fn labels_are_part_of_the_name() {
        let labels = [("host", "a\"b"), ("code", "200")];
        assert_eq!(series_name("sent", labels.into_iter()), r#"sent{host="a\"b",code="200"}"#);
    }
}
