//! `sluice trace`: what recorded routing shows about caches.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Subcommand;
use sluice_lab::trace::{Replay, Row, Stats, Trace};
use sluice_storage::pool::PolicyKind;

use crate::error::CliError;
use crate::terminal::{counted, note, print, print_json, printable};

const EXAMPLES: &str = "\
A trace has one JSON object per line, for one token each: {\"tok\": 0, \"layers\": [[expert ids of layer 0], …]}. \
`sluice run FILE --trace TRACE` records one.

Examples:
  sluice trace replay chat.jsonl
  sluice trace replay a.jsonl b.jsonl --cache 3%,12% --policy all --json
  sluice trace stats chat.jsonl";

/// Replay and describe recorded routing
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Replay(ReplayArgs),
    Stats(StatsArgs),
}

/// Hit rates that policies would have had, beside the optimum (Bélády)
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
struct ReplayArgs {
    /// Traces
    #[arg(required = true)]
    traces: Vec<PathBuf>,

    /// Sizes of the cache, as parts of all experts
    #[arg(long, value_name = "LIST", default_value = "3%,6%,12%,25%", value_delimiter = ',')]
    cache: Vec<Fraction>,

    /// Policies: next-use, lru, lfu, belady, several separated by commas, or all
    #[arg(long, value_name = "LIST", default_value = "all", value_delimiter = ',')]
    policy: Vec<Policies>,

    /// Experts per layer [default: the number in the trace's header, or the largest id, rounded up to a power of two]
    #[arg(long, value_name = "N")]
    experts: Option<u32>,

    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

/// Reuse, popularity and working set of a trace
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
struct StatsArgs {
    /// The trace
    trace: PathBuf,

    /// Experts per layer [default: the number in the trace's header, or the largest id, rounded up to a power of two]
    #[arg(long, value_name = "N")]
    experts: Option<u32>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A part of a whole: `12%` or `0.12`.
#[derive(Clone, Copy, Debug)]
struct Fraction(f64);

impl FromStr for Fraction {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (number, unit) = s.strip_suffix('%').map_or((s, 1.0), |percent| (percent, 100.0));
        let value = number.trim().parse::<f64>().map(|v| v / unit).ok();
        let fits = value.filter(|v| *v > 0.0 && *v <= 1.0);
        fits.map(Fraction).ok_or_else(|| format!("`{s}` is not a part of a whole: write `12%` or `0.12`"))
    }
}

#[derive(Clone, Copy, Debug)]
enum Policies {
    All,
    One(PolicyKind),
}

impl FromStr for Policies {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        if s == "all" { Ok(Policies::All) } else { s.parse().map(Policies::One).map_err(|e| format!("{e}, or all")) }
    }
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    match &args.action {
        Action::Replay(args) => replay(args),
        Action::Stats(args) => stats(args),
    }
}

fn replay(args: &ReplayArgs) -> Result<(), CliError> {
    let mut policies = Vec::new();
    for choice in &args.policy {
        match choice {
            Policies::All => policies.extend(PolicyKind::ONLINE),
            Policies::One(kind) => policies.push(*kind),
        }
    }
    let caches: Vec<f64> = args.cache.iter().map(|f| f.0).collect();
    let mut rows = Vec::new();
    for path in &args.traces {
        let name = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy();
        let replay = Replay::new(&open(path)?, args.experts).map_err(CliError::replay(path))?;
        rows.extend(replay.report(&name, &policies, &caches));
    }
    if args.json { print_json(&rows) } else { print(&table(&rows)) }
}

fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|r| r.trace.len()).max().unwrap_or(0).max("trace".len());
    let mut out = format!(
        "{:<width$}  {:>6}  {:>6}  {:<10} {:>6}  {:>7}\n",
        "trace", "cache", "slots", "policy", "hits", "optimum"
    );
    for r in rows {
        let mark = if r.default { "*" } else { " " };
        let policy = format!("{}{mark}", r.policy);
        let (cache, hits, optimal) = (100.0 * r.cache, 100.0 * r.hit_rate, 100.0 * r.optimal);
        out += &format!(
            "{:<width$}  {cache:>5.1}%  {:>6}  {policy:<10} {hits:>5.1}%  {optimal:>6.1}%\n",
            r.trace, r.slots
        );
    }
    out + "* what `sluice run` uses\n"
}

/// Reads a trace, and reports if its end is missing.
pub(super) fn open(path: &Path) -> Result<Trace, CliError> {
    let trace = Trace::open(path)?;
    if trace.is_cut_short() {
        let (path, tokens) = (path.display(), counted(trace.tokens().len(), "complete token"));
        note(&format_args!("note: {path} ends within a line, which is left out: there are {tokens}"));
    }
    Ok(trace)
}

fn stats(args: &StatsArgs) -> Result<(), CliError> {
    let stats = Stats::new(&open(&args.trace)?, args.experts).map_err(CliError::replay(&args.trace))?;
    if args.json { print_json(&stats) } else { print(&describe(&stats)) }
}

fn describe(s: &Stats) -> String {
    let percent = |part: f64| format!("{:.1} %", 100.0 * part);
    let mut out = String::new();
    let mut line = |name: &str, value: String| out += &format!("{name:<28}{value}\n");
    if let Some(model) = &s.model {
        line("Model", printable(model));
    }
    line("Tokens", format!("{}, {} of them known to be of a prompt", s.tokens, s.prefill));
    line("Routed layers", s.layers.len().to_string());
    line("Experts per layer", s.experts.to_string());
    line("Experts per token", format!("{:.0}", s.cycle));
    line("Distinct experts used", format!("{} of {}", s.distinct, s.experts as usize * s.layers.len()));
    line("Used by the token before", percent(s.repeated));
    line("Uses of the top tenth", percent(s.top_tenth));
    if let Some(median) = s.median_reuse {
        line("Median reuse distance", format!("{median} tokens"));
    }
    for (i, part) in s.reuse.iter().enumerate() {
        line(&format!("Reused within {} tokens", 1u64 << i), percent(*part));
    }
    for (i, experts) in s.working_set.iter().enumerate() {
        line(&format!("Working set of {} tokens", 1u64 << i), format!("{experts:.0} experts"));
    }
    out
}
