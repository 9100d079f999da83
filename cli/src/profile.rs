//! Where the time and the bytes of a generation went.

use std::fmt::Write as _;
use std::time::Instant;

use serde::Serialize;
use sluice_model::memory::{Bytes, MemoryPlan};
use sluice_model::{Engine, PromptAttention, Stats};
use sluice_storage::io::TuningSource;

use crate::drafts::DraftCounts;
use crate::generate::Generation;
use crate::plot::bars::{Bar, BarChart};
use crate::terminal::{counted, percent, seconds};

/// One part of a generation: the prompt, or the tokens after it.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Phase {
    /// Tokens that went through the layers.
    pub(crate) tokens: u64,
    /// Wall-clock time.
    pub(crate) seconds: f64,
    pub(crate) tokens_per_second: f64,
    /// Bytes of experts read.
    pub(crate) expert_bytes_read: u64,
    pub(crate) expert_bytes_read_per_token: f64,
    /// Experts found in memory.
    pub(crate) hits: u64,
    /// Experts that had to be read.
    pub(crate) misses: u64,
    /// Prefetched experts: those read before the router chose them.
    pub(crate) prefetched: u64,
    /// Prefetched experts that were used before they left memory.
    pub(crate) prefetched_used: u64,
    /// Prefetched experts that left memory, or were given up, unused.
    pub(crate) prefetched_wasted: u64,
    /// Hits as a part of both; `None` if no expert was needed.
    pub(crate) hit_rate: Option<f64>,
    /// Hits and misses that were chosen instead of the routers' own, because experts in memory were preferred.
    pub(crate) replaced: u64,
    /// Part of the time spent waiting for experts.
    pub(crate) io_wait_seconds: f64,
    /// Part of the time spent in attention.
    pub(crate) attention_seconds: f64,
    /// Part of the time spent in routed experts.
    pub(crate) expert_seconds: f64,
    /// Part of the time spent in the output head.
    pub(crate) head_seconds: f64,
    /// The rest.
    pub(crate) other_seconds: f64,
}

impl Phase {
    /// The difference since `before` was taken.
    pub(crate) fn since(before: &(Instant, Stats), engine: &Engine) -> Phase {
        Self::between(&before.1, &engine.stats(), before.0.elapsed().as_secs_f64())
    }

    fn between(a: &Stats, b: &Stats, seconds: f64) -> Phase {
        let tokens = b.tokens - a.tokens;
        let bytes = b.expert_bytes_read - a.expert_bytes_read;
        let (hits, misses) = (b.hits - a.hits, b.misses - a.misses);
        let io_wait_seconds = b.io_wait_seconds - a.io_wait_seconds;
        let attention_seconds = b.attention_seconds - a.attention_seconds;
        let expert_seconds = b.expert_seconds - a.expert_seconds;
        let head_seconds = b.head_seconds - a.head_seconds;
        let named = io_wait_seconds + attention_seconds + expert_seconds + head_seconds;
        Phase {
            tokens,
            seconds,
            tokens_per_second: if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 },
            expert_bytes_read: bytes,
            expert_bytes_read_per_token: if tokens > 0 { bytes as f64 / tokens as f64 } else { 0.0 },
            hits,
            misses,
            prefetched: b.prefetched - a.prefetched,
            prefetched_used: b.prefetched_used - a.prefetched_used,
            prefetched_wasted: b.prefetched_wasted - a.prefetched_wasted,
            replaced: b.replaced - a.replaced,
            hit_rate: (hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64),
            io_wait_seconds,
            attention_seconds,
            expert_seconds,
            head_seconds,
            other_seconds: (seconds - named).max(0.0),
        }
    }

    /// The phase without rows that gave no token: this many proposals did not come true.
    pub(crate) fn without(self, rejected: u64) -> Phase {
        let tokens = self.tokens.saturating_sub(rejected);
        let each = |total: f64, by: f64| if by > 0.0 { total / by } else { 0.0 };
        Phase {
            tokens,
            tokens_per_second: each(tokens as f64, self.seconds),
            expert_bytes_read_per_token: each(self.expert_bytes_read as f64, tokens as f64),
            ..self
        }
    }

    /// Milliseconds of one token, part by part.
    fn bar(&self, name: &str) -> Bar {
        let parts =
            [self.io_wait_seconds, self.expert_seconds, self.attention_seconds, self.head_seconds, self.other_seconds];
        let of_token = |seconds: f64| 1e3 * seconds / self.tokens.max(1) as f64;
        let mut remark = format!("{}, {:.2} tokens/s", counted(self.tokens, "token"), self.tokens_per_second);
        if let Some(hit_rate) = self.hit_rate {
            let read = Bytes(self.expert_bytes_read_per_token as u64);
            let _ = write!(remark, "; {read} of experts read per token, {:.1} % found in memory", 100.0 * hit_rate);
        }
        Bar { name: name.to_owned(), remark, values: parts.map(of_token).to_vec() }
    }

    fn lines(&self, name: &str) -> String {
        if self.tokens == 0 {
            return format!("{name:<9} nothing to do\n");
        }
        let (tokens, rate) = (counted(self.tokens, "token"), self.tokens_per_second);
        let mut out = format!("{name:<9} {tokens} in {}: {rate:.2} tokens/s", seconds(self.seconds));
        let part = |value| percent(value, self.seconds);
        let mut experts = String::new();
        // There is no rate if a model has no experts.
        if let Some(hit_rate) = self.hit_rate {
            let _ = write!(
                out,
                ", {} of experts read per token, {} in all\n          \
                 {} of {} experts were in memory ({:.1} %); {} read ahead, {} of them used, {} in vain",
                Bytes(self.expert_bytes_read_per_token as u64),
                Bytes(self.expert_bytes_read),
                self.hits,
                self.hits + self.misses,
                100.0 * hit_rate,
                self.prefetched,
                self.prefetched_used,
                self.prefetched_wasted,
            );
            experts = format!("experts {:.0} %, ", part(self.expert_seconds));
        }
        let _ = writeln!(
            out,
            "\n          waiting for the drive {:.0} %, {experts}attention {:.0} %, output head {:.0} %, other {:.0} %",
            part(self.io_wait_seconds),
            part(self.attention_seconds),
            part(self.head_seconds),
            part(self.other_seconds),
        );
        out
    }
}

/// The whole report.
#[derive(Debug, Serialize)]
pub(crate) struct Profile {
    /// Time to open the model: checks, the plan of the memory. Dense weights are still being read then.
    pub(crate) open_seconds: f64,
    /// Time from the start of the command until the first token had been shown; `None` if there is no token.
    pub(crate) first_token_seconds: Option<f64>,
    /// Bytes of experts, dense weights and embedding read until then.
    pub(crate) first_token_bytes_read: Option<u64>,
    pub(crate) prefill: Phase,
    pub(crate) decode: Phase,
    /// The outcome of proposed tokens.
    pub(crate) drafts: DraftCounts,
    /// Bytes of dense weights and embedding read.
    pub(crate) dense_bytes_read: u64,
    pub(crate) memory: MemoryPlan,
    /// How the file is read, in words.
    pub(crate) read_path: String,
    pub(crate) read_tuning: ReadTuning,
    pub(crate) isa: &'static str,
    pub(crate) threads: usize,
    /// How experts were chosen otherwise than by the model's routers, in words; `None` if they were not.
    pub(crate) lossy: Option<String>,
    /// In which form prompts were read; `None`: in the usual one.
    pub(crate) prompt_attention: Option<&'static str>,
}

/// The pieces in which the file is read.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ReadTuning {
    /// Short name of the engine in use.
    engine: &'static str,
    chunk_bytes: usize,
    depth: usize,
    prefetch_depth: usize,
    /// Whether `sluice bench disk` found these settings on this drive.
    calibrated: bool,
    /// Why a calibration was not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    remark: Option<String>,
}

impl ReadTuning {
    fn of(engine: &Engine) -> ReadTuning {
        let tuning = engine.tuning();
        ReadTuning {
            engine: engine.read_engine(),
            chunk_bytes: tuning.config.chunk_bytes,
            depth: engine.depth(),
            prefetch_depth: match tuning.source {
                TuningSource::Default(_) => engine.depth(),
                TuningSource::Given | TuningSource::Calibrated => tuning.config.prefetch_depth,
            },
            calibrated: tuning.source == TuningSource::Calibrated,
            remark: match &tuning.source {
                TuningSource::Default(remark) => remark.clone(),
                TuningSource::Given | TuningSource::Calibrated => None,
            },
        }
    }

    fn line(&self) -> String {
        let source = match (&self.remark, self.calibrated) {
            (_, true) => "calibrated for this drive".to_owned(),
            (Some(remark), _) => format!("not calibrated: {remark}"),
            (None, _) => "not calibrated: adapts to the drive".to_owned(),
        };
        let chunk = Bytes(self.chunk_bytes as u64);
        format!("{} with chunks of {chunk}, {} in flight ({source})", self.engine, self.depth)
    }
}

/// A part of the memory, in words; nothing for none.
fn part(before: &str, bytes: u64, behind: &str) -> String {
    if bytes == 0 { String::new() } else { format!("{before}{}{behind}", Bytes(bytes)) }
}

/// How experts are chosen otherwise than by the model's routers, in words, if they are.
pub(crate) fn lossy(engine: &Engine) -> Option<String> {
    let thrift = engine.thrift();
    (!thrift.is_exact()).then(|| thrift.to_string())
}

/// The form in which prompts are read, if it is not the usual one.
pub(crate) fn prompt_attention(engine: &Engine) -> Option<&'static str> {
    let form = engine.prompt_attention();
    (form != PromptAttention::default()).then(|| form.name())
}

impl Profile {
    /// `started`: when the command did; the model had been opened `open_seconds` later.
    pub(crate) fn new(engine: &Engine, generation: &Generation, started: Instant, open_seconds: f64) -> Profile {
        let first = generation.first_token;
        Profile {
            open_seconds,
            first_token_seconds: first.map(|first| first.at.saturating_duration_since(started).as_secs_f64()),
            first_token_bytes_read: first.map(|first| first.bytes_read),
            prefill: generation.prefill.clone(),
            decode: generation.decode.clone(),
            drafts: generation.drafts,
            dense_bytes_read: engine.stats().dense_bytes_read,
            memory: engine.memory().clone(),
            read_path: engine.read_path(),
            read_tuning: ReadTuning::of(engine),
            isa: engine.isa(),
            threads: engine.threads(),
            lossy: lossy(engine),
            prompt_attention: prompt_attention(engine),
        }
    }

    /// Where the time of a token went, for the answer and for the prompt.
    pub(crate) fn chart(&self, family: &str) -> BarChart {
        let memory = Bytes(self.memory.used());
        BarChart {
            title: format!("A token's time: {family}, {memory} in use, {} on {} threads", self.isa, self.threads),
            unit: "ms",
            parts: vec!["waiting for the drive", "experts", "attention", "output head", "other"],
            bars: vec![self.decode.bar("A token of the answer"), self.prefill.bar("A token of the prompt")],
        }
    }

    /// For people.
    pub(crate) fn report(&self) -> String {
        let memory = &self.memory;
        let mut out = self.prefill.lines("prefill") + &self.decode.lines("decode");
        let requested = memory.requested.map_or("not limited".to_owned(), |r| Bytes(r).to_string());
        let experts = match memory.experts {
            0 => String::new(),
            all => format!(", experts {} ({} of {all})", Bytes(memory.slot_bytes), memory.slots),
        };
        let _ = writeln!(
            out,
            "memory    requested {requested}, effective {}, used {}: dense {}{}, key-value cache {} ({}),\n          \
             scratch {}{}{experts}",
            Bytes(memory.effective),
            Bytes(memory.used()),
            Bytes(memory.dense),
            part(" and a ring of ", memory.dense_ring, " for the rest"),
            Bytes(memory.kv_cache),
            memory.kv_type,
            Bytes(memory.scratch),
            part(", compressed experts ", memory.staging, ""),
        );
        if memory.dense_streamed > 0 {
            let (streamed, read) = (Bytes(memory.dense_streamed), Bytes(self.dense_bytes_read));
            let _ = writeln!(
                out,
                "          {streamed} of dense parts are read again for every step: {read} of dense parts and embedding in all"
            );
        }
        if self.drafts.proposed > 0 {
            let DraftCounts { proposed, accepted } = self.drafts;
            let _ = writeln!(out, "drafts    {proposed} tokens were proposed, {accepted} of them came true");
        }
        if let Some(lossy) = &self.lossy {
            let _ = writeln!(out, "lossy     {lossy}");
            let replaced = self.prefill.replaced + self.decode.replaced;
            if replaced > 0 {
                let all = [&self.prefill, &self.decode].map(|phase| phase.hits + phase.misses).iter().sum::<u64>();
                let _ = writeln!(out, "          {replaced} of {all} experts were not the routers' own");
            }
        }
        if let Some(form) = self.prompt_attention {
            let _ = writeln!(out, "prompts   {form} form of latent attention");
        }
        let _ = writeln!(out, "reads     {}", self.read_path);
        let _ = writeln!(out, "          {}", self.read_tuning.line());
        let _ = writeln!(out, "computes  {} on {}", self.isa, counted(self.threads, "thread"));
        let _ = write!(out, "start     opened in {}", seconds(self.open_seconds));
        if let (Some(after), Some(read)) = (self.first_token_seconds, self.first_token_bytes_read) {
            let (after, read) = (seconds(after), Bytes(read));
            let _ = write!(out, "; the first token came {after} after the start, when {read} had been read");
        }
        out.push('\n');
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_differences() {
        let a = Stats { tokens: 3, hits: 1, misses: 9, expert_bytes_read: 100, ..Stats::default() };
        let b =
            Stats { tokens: 7, hits: 4, misses: 10, expert_bytes_read: 140, io_wait_seconds: 0.5, ..Stats::default() };
        let phase = Phase::between(&a, &b, 2.0);
        assert_eq!((phase.tokens, phase.tokens_per_second), (4, 2.0));
        assert_eq!((phase.expert_bytes_read_per_token, phase.hit_rate), (10.0, Some(0.75)));
        assert_eq!(phase.other_seconds, 1.5);
        let lines = phase.lines("decode");
        assert!(lines.contains("3 of 4 experts were in memory (75.0 %)") && lines.lines().count() == 3, "{lines}");
    }

    #[test]
    fn a_token_has_its_part_of_the_time() {
        let b = Stats { tokens: 4, hits: 1, misses: 1, io_wait_seconds: 0.5, expert_seconds: 1.0, ..Stats::default() };
        let bar = Phase::between(&Stats::default(), &b, 2.0).bar("A token");
        assert_eq!(bar.values, [125.0, 250.0, 0.0, 0.0, 125.0]);
        assert!(bar.remark.contains("2.00 tokens/s") && bar.remark.contains("50.0 % found"), "{}", bar.remark);
    }

    #[test]
    fn models_without_experts_have_none_in_the_report() {
        let phase = Phase::between(&Stats::default(), &Stats { tokens: 4, ..Stats::default() }, 2.0);
        let lines = phase.lines("decode");
        assert!(lines.contains("4 tokens in") && lines.lines().count() == 2 && !lines.contains("experts"), "{lines}");
    }

    #[test]
    fn nothing_happened() {
        let phase = Phase::between(&Stats::default(), &Stats::default(), 0.0);
        assert_eq!((phase.tokens_per_second, phase.hit_rate), (0.0, None));
        assert!(phase.lines("decode").contains("nothing"));
    }
}
