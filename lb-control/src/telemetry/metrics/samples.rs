//! Values of metrics at one time, and their text.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use anyhow::{Context, Result};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::table::{ALL, Kind, Metric};

/// Type of the text that [`Samples::text`] makes.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Values of labels, in the order of [`Metric::labels`]. Shared between metrics that have the same.
pub type Labels = Arc<[String]>;

/// Values, by metric and labels.
#[derive(Debug, Default)]
pub struct Samples {
    counters: BTreeMap<&'static str, BTreeMap<Tail, u64>>,
    gauges: BTreeMap<&'static str, BTreeMap<Tail, f64>>,
    histograms: BTreeMap<&'static str, Histogram>,
}

/// Shared labels, and one more if a metric has one beside them.
type Tail = (Labels, Option<&'static str>);

/// Labels of a metric.
pub fn labels<const N: usize>(values: [&str; N]) -> Labels {
    values.map(str::to_owned).into()
}

impl Samples {
    /// Adds to a counter.
    pub fn count(&mut self, metric: &'static Metric, labels: &Labels, value: u64) {
        self.count_last(metric, labels, None, value);
    }

    /// Adds to two counters that differ in the last label, which is `in` for the one and `out` for
    /// the other.
    pub fn count_directions(&mut self, metric: &'static Metric, labels: &Labels, [r#in, out]: [u64; 2]) {
        self.count_last(metric, labels, Some("in"), r#in);
        self.count_last(metric, labels, Some("out"), out);
    }

    fn count_last(
        &mut self,
        metric: &'static Metric,
        labels: &Labels,
        last: Option<&'static str>,
        value: u64,
    ) {
        debug_assert_eq!(metric.kind, Kind::Counter, "{}", metric.name);
        debug_assert_eq!(metric.labels.len(), labels.len() + usize::from(last.is_some()), "{}", metric.name);
        // Two values with the same labels would spoil the whole exposition.
        *self.counters.entry(metric.name).or_default().entry((Arc::clone(labels), last)).or_default() +=
            value;
    }

    /// Adds to a gauge.
    pub fn level(&mut self, metric: &'static Metric, labels: &Labels, value: f64) {
        debug_assert_eq!(metric.kind, Kind::Gauge, "{}", metric.name);
        debug_assert_eq!(metric.labels.len(), labels.len(), "{}", metric.name);
        *self.gauges.entry(metric.name).or_default().entry((Arc::clone(labels), None)).or_default() += value;
    }

    /// Adds to a gauge without labels.
    pub fn plain(&mut self, metric: &'static Metric, value: f64) {
        self.level(metric, &labels([]), value);
    }

    /// Adds a distribution.
    pub fn distribution(&mut self, metric: &'static Metric, histogram: Histogram) {
        debug_assert_eq!(metric.kind, Kind::Histogram, "{}", metric.name);
        self.histograms.insert(metric.name, histogram);
    }

    /// As Prometheus reads it (OpenMetrics 1.0).
    ///
    /// # Errors
    /// Never in practice: writing to memory cannot fail.
    pub fn text(self) -> Result<String> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        text::encode(&mut text, &registry).context("writing metrics")?;
        Ok(text)
    }

    fn encode_one(&self, metric: &'static Metric, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let kind = match metric.kind {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
            Kind::Histogram => MetricType::Histogram,
        };
        // What the descriptor is called, samples of counters are called with this suffix.
        let name = metric.name.strip_suffix("_total").unwrap_or(metric.name);
        let (counters, gauges) = (self.counters.get(metric.name), self.gauges.get(metric.name));
        let histogram = self.histograms.get(metric.name);
        if counters.is_none() && gauges.is_none() && histogram.is_none() {
            return Ok(());
        }
        let mut encoder = encoder.encode_descriptor(name, metric.help, None, kind)?;
        for (tail, value) in counters.into_iter().flatten() {
            with_labels(&mut encoder, metric, tail, |one| {
                one.encode_counter::<[(&str, &str); 0], u64, u64>(value, None)
            })?;
        }
        for (tail, value) in gauges.into_iter().flatten() {
            with_labels(&mut encoder, metric, tail, |one| one.encode_gauge(value))?;
        }
        histogram.map_or(Ok(()), |histogram| histogram.encode(encoder))
    }
}

fn with_labels(
    encoder: &mut MetricEncoder<'_>,
    metric: &Metric,
    (labels, last): &Tail,
    encode: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result,
) -> fmt::Result {
    let values = labels.iter().map(String::as_str).chain(*last);
    let pairs: Vec<(&str, &str)> = metric.labels.iter().copied().zip(values).collect();
    if pairs.is_empty() {
        return encode(encoder);
    }
    encode(&mut encoder.encode_family(&pairs)?)
}

impl Collector for Samples {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        ALL.iter().try_for_each(|metric| self.encode_one(metric, &mut encoder))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::table;

    #[test]
    fn text_is_as_prometheus_reads_it() {
        let mut samples = Samples::default();
        let web = labels(["default", "we\"b\n", "TCP", "192.0.2.1", "80"]);
        samples.count_directions(&table::SERVICE_PACKETS, &web, [7, 8]);
        samples.count(&table::SERVICE_REFUSED, &web, 1);
        samples.count(&table::SERVICE_REFUSED, &web, 2);
        samples.count(&table::SOURCE_UPDATES, &labels([]), u64::MAX);
        samples.plain(&table::UPTIME, 1.5);
        let histogram = Histogram::new([0.1, 1.0]);
        histogram.observe(0.5);
        samples.distribution(&table::UPDATE_DURATION, histogram);
        let text = samples.text().unwrap();
        let label = r#"{namespace="default",service="we\"b\n",protocol="TCP",vip="192.0.2.1",port="80""#;
        for line in [
            "# TYPE pointsman_service_packets counter".to_owned(),
            format!("pointsman_service_packets_total{label},direction=\"in\"}} 7"),
            format!("pointsman_service_packets_total{label},direction=\"out\"}} 8"),
            format!("pointsman_service_refused_total{label}}} 3"),
            format!("pointsman_source_updates_total {}", u64::MAX),
            "# TYPE pointsman_uptime_seconds gauge".to_owned(),
            "pointsman_uptime_seconds 1.5".to_owned(),
            "pointsman_update_apply_seconds_bucket{le=\"1.0\"} 1".to_owned(),
        ] {
            assert!(text.lines().any(|found| found == line), "{line}:\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
