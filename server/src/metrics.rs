//! Counters for Prometheus.

use std::fmt;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use sluice_generate::Status;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StatusLabel {
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabel {
    model: String,
}

type ModelGauge = Family<ModelLabel, Gauge<f64, AtomicU64>>;

/// The counters of a server.
pub struct Metrics {
    registry: Registry,
    responses: Family<StatusLabel, Counter>,
    live: Gauge,
    queued: ModelGauge,
    reading: ModelGauge,
    decoding: ModelGauge,
    saved: ModelGauge,
    preemptions: ModelGauge,
    prompt_rate: ModelGauge,
    decode_rate: ModelGauge,
}

impl Metrics {
    /// Counters that begin at 0.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("sluice");
        let responses = Family::default();
        registry.register("http_responses", "Responses by status", responses.clone());
        let live = Gauge::default();
        registry.register("answers", "Answers that are being made", live.clone());
        let mut gauge = |name: &str, help: &str| {
            let gauge = ModelGauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        Metrics {
            queued: gauge("generations_queued", "Generations that wait for pages"),
            reading: gauge("generations_reading", "Generations whose prompt is being read"),
            decoding: gauge("generations_decoding", "Generations that are decoding"),
            saved: gauge(
                "generations_saved",
                "Generations that were saved to make room for older ones, and will continue",
            ),
            preemptions: gauge("preemptions", "How often a generation was saved since the start"),
            prompt_rate: gauge("prompt_tokens_per_second", "Tokens of prompts read per second over the latest turns"),
            decode_rate: gauge("tokens_per_second", "Tokens generated per second over the latest turns"),
            responses,
            live,
            registry,
        }
    }

    /// A response has begun.
    pub fn response(&self, status: u16) {
        self.responses.get_or_create(&StatusLabel { status }).inc();
    }

    /// Updates the gauges of a model.
    pub fn model(&self, id: &str, status: &Status) {
        let label = ModelLabel { model: id.to_owned() };
        let set = |gauge: &ModelGauge, value: f64| _ = gauge.get_or_create(&label).set(value);
        set(&self.queued, status.queued as f64);
        set(&self.reading, status.reading as f64);
        set(&self.decoding, status.decoding as f64);
        set(&self.saved, status.saved as f64);
        set(&self.preemptions, status.preemptions as f64);
        set(&self.prompt_rate, status.prompt_tokens_per_second);
        set(&self.decode_rate, status.tokens_per_second);
    }

    /// All counters in the text format of OpenMetrics.
    ///
    /// # Errors
    /// Never in practice, because writing to memory does not fail.
    pub fn text(&self, live: usize) -> Result<String, fmt::Error> {
        self.live.set(i64::try_from(live).unwrap_or(i64::MAX));
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_written_as_prometheus_reads_them() {
        let metrics = Metrics::new();
        metrics.response(200);
        metrics.response(200);
        metrics.response(429);
        metrics.model("demo", &Status { queued: 3, ..Status::default() });
        let text = metrics.text(2).unwrap();
        for line in [
            "sluice_http_responses_total{status=\"200\"} 2",
            "sluice_http_responses_total{status=\"429\"} 1",
            "sluice_answers 2",
            "sluice_generations_queued{model=\"demo\"} 3.0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
