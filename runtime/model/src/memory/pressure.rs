//! Whether the system is short of memory, and whether a budget should shrink or grow.
//!
//! Linux reports how long tasks have waited for memory (`/proc/pressure/memory` and each control group's `memory.pressure`), how
//! much is left, and how often a group has run out (`memory.events`). The counters `high` and `max` of the latter are not used:
//! they also rise when a limit only drops pages of files, which costs next to nothing. macOS reports a level.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::available::{Group, groups_of, meminfo_available};

/// The system is short of memory if some task has waited for memory for at least this part of the last ten seconds, in percent.
const STALLED: f32 = 10.0;
/// The system is short of memory if less than this is left, because the next large allocation of any program may fail. On a small
/// machine, where the plan itself leaves little more, the limit is half of the memory that was left at the start.
const LAST_BYTES: u64 = 128 << 20;
/// Time between two checks.
const LOOK: Duration = Duration::from_millis(250);
/// Time between two shrinking steps, so that the returned memory can show in the figures.
const SETTLE: Duration = Duration::from_secs(2);
/// Time without pressure before the budget grows by a step: at first, and at most. It doubles whenever growing has brought the
/// pressure back.
const CALM: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(960));

/// A system's report on its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// Percent of the last ten seconds in which some task waited for memory; the worst figure of the system and the groups that
    /// hold the process.
    pub stalled: f32,
    /// Bytes that are left, if known.
    pub available: Option<u64>,
    /// How often a group that holds the process has run out of memory.
    pub exhausted: u64,
}

/// How a budget should change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Stay.
    Keep,
    /// Shrink by a step.
    Less,
    /// Grow by a step.
    More,
}

/// Decides when to shrink and when to grow. It reads neither a clock nor a file, so tests control everything that it sees.
#[derive(Clone, Debug)]
pub struct Pressure {
    /// With fewer bytes left, the system is short of memory.
    last_bytes: u64,
    /// How often groups had run out at the last check.
    exhausted: Option<u64>,
    /// Time of the last pressure or of the last change of the budget.
    pressed: Duration,
    shrunk: Option<Duration>,
    grown: Option<Duration>,
    calm: Duration,
}

impl Default for Pressure {
    fn default() -> Self {
        Pressure {
            last_bytes: LAST_BYTES,
            exhausted: None,
            pressed: Duration::ZERO,
            shrunk: None,
            grown: None,
            calm: CALM.0,
        }
    }
}

impl Pressure {
    /// For a system that reported `first` when the plan was carried out.
    pub fn new(first: &Sample) -> Self {
        let half = first.available.map_or(u64::MAX, |left| left / 2);
        Pressure { last_bytes: LAST_BYTES.min(half), ..Pressure::default() }
    }

    /// The decision `now` after the start, when the system reports `sample`. `shrunk`: whether the budget can grow back.
    pub fn decide(&mut self, now: Duration, sample: &Sample, shrunk: bool) -> Wish {
        let ran_out = self.exhausted.replace(sample.exhausted).is_some_and(|before| sample.exhausted > before);
        let short = sample.available.is_some_and(|left| left < self.last_bytes);
        if ran_out || short || sample.stalled >= STALLED {
            self.pressed = now;
            if self.grown.take().is_some_and(|grown| now < grown + self.calm) {
                self.calm = (2 * self.calm).min(CALM.1);
            }
            if self.shrunk.is_some_and(|at| now < at + SETTLE) {
                return Wish::Keep;
            }
            self.shrunk = Some(now);
            return Wish::Less;
        }
        if !shrunk {
            return Wish::Keep;
        }
        let since = self.grown.map_or(self.pressed, |grown| grown.max(self.pressed));
        if now < since + self.calm {
            return Wish::Keep;
        }
        if self.grown.is_some() && now >= self.pressed + 4 * self.calm {
            self.calm = CALM.0;
        }
        self.grown = Some(now);
        Wish::More
    }
}

/// Checks the system from time to time.
#[derive(Debug)]
pub struct PressureWatch {
    started: Instant,
    looked: Option<Instant>,
    policy: Pressure,
    source: Source,
}

impl PressureWatch {
    /// A watch on this system; `None` if the system reports nothing about memory pressure.
    pub fn new() -> Option<Self> {
        let source = Source::of_system();
        let policy = Pressure::new(&source.sample()?);
        Some(PressureWatch { started: Instant::now(), looked: None, policy, source })
    }

    /// The decision now. Cheap, because it checks at most four times a second.
    pub fn look(&mut self, now: Instant, shrunk: bool) -> Wish {
        if self.looked.is_some_and(|looked| now < looked + LOOK) {
            return Wish::Keep;
        }
        self.looked = Some(now);
        let Some(sample) = self.source.sample() else { return Wish::Keep };
        self.policy.decide(now.saturating_duration_since(self.started), &sample, shrunk)
    }
}

/// The places of the figures.
#[derive(Debug)]
struct Source {
    /// `/proc`.
    proc: PathBuf,
    groups: Vec<Group>,
}

impl Source {
    fn of_system() -> Self {
        let list = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Source { proc: PathBuf::from("/proc"), groups: groups_of(&list, Path::new("/sys/fs/cgroup")) }
    }

    /// `None` if the system reports no pressure.
    fn sample(&self) -> Option<Sample> {
        if let Some(level) = sluice_storage::io::memory_pressure_level() {
            let stalled = if level > 1 { 100.0 } else { 0.0 };
            return Some(Sample { stalled, ..Sample::default() });
        }
        let system = fs::read_to_string(self.proc.join("pressure/memory")).ok();
        let of_groups = self.groups.iter().filter_map(|group| group.read("memory.pressure"));
        let stalled = system.into_iter().chain(of_groups).filter_map(|text| stalled(&text)).reduce(f32::max)?;
        let left = self.groups.iter().filter_map(Group::allows);
        let available = left.chain(meminfo_available(&self.proc.join("meminfo"))).min();
        let exhausted =
            self.groups.iter().filter_map(|group| group.read("memory.events")).map(|text| ran_out(&text)).sum();
        Some(Sample { stalled, available, exhausted })
    }
}

/// `some avg10=1.23 avg60=… avg300=… total=…`: the first number, percent.
fn stalled(text: &str) -> Option<f32> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let percent = line.split_whitespace().find_map(|field| field.strip_prefix("avg10="))?;
    percent.parse().ok().filter(|percent: &f32| (0.0..=100.0).contains(percent))
}

/// How often a group has run out, from its `memory.events`.
fn ran_out(text: &str) -> u64 {
    let events = text.lines().filter_map(|line| line.split_once(' '));
    let serious = events.filter(|(name, _)| matches!(*name, "oom" | "oom_kill"));
    serious.filter_map(|(_, count)| count.trim().parse::<u64>().ok()).fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALM_SAMPLE: Sample = Sample { stalled: 0.0, available: None, exhausted: 0 };

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn it_shrinks_in_steps_while_there_is_pressure_and_grows_after_a_calm() {
        let mut pressure = Pressure::default();
        let hard = Sample { stalled: 25.0, ..CALM_SAMPLE };
        assert_eq!(pressure.decide(at(0.0), &CALM_SAMPLE, false), Wish::Keep);
        assert_eq!(pressure.decide(at(1.0), &hard, false), Wish::Less);
        assert_eq!(pressure.decide(at(2.0), &hard, true), Wish::Keep, "the first step must be able to show");
        assert_eq!(pressure.decide(at(3.1), &hard, true), Wish::Less);
        assert_eq!(pressure.decide(at(20.0), &CALM_SAMPLE, true), Wish::Keep);
        assert_eq!(pressure.decide(at(34.0), &CALM_SAMPLE, true), Wish::More);
        assert_eq!(pressure.decide(at(50.0), &CALM_SAMPLE, true), Wish::Keep, "one step at a time");
        assert_eq!(pressure.decide(at(65.0), &CALM_SAMPLE, true), Wish::More);
        assert_eq!(pressure.decide(at(500.0), &CALM_SAMPLE, false), Wish::Keep, "there is nothing to grow back");
    }

    #[test]
    fn growing_that_brings_the_pressure_back_is_tried_less_often() {
        let mut pressure = Pressure::default();
        let hard = Sample { stalled: 10.0, ..CALM_SAMPLE };
        assert_eq!(pressure.decide(at(0.0), &hard, false), Wish::Less);
        assert_eq!(pressure.decide(at(30.0), &CALM_SAMPLE, true), Wish::More);
        assert_eq!(pressure.decide(at(40.0), &hard, false), Wish::Less);
        assert_eq!(pressure.decide(at(75.0), &CALM_SAMPLE, true), Wish::Keep, "twice as long now");
        assert_eq!(pressure.decide(at(100.0), &CALM_SAMPLE, true), Wish::More);
        for _ in 0..20 {
            let later = pressure.grown.unwrap_or(pressure.pressed) + at(1.0);
            assert_ne!(pressure.decide(later, &hard, true), Wish::More);
            let calm = pressure.pressed + pressure.calm;
            assert_eq!(pressure.decide(calm, &CALM_SAMPLE, true), Wish::More);
        }
        assert_eq!(pressure.calm, CALM.1, "there is a longest calm");
    }

    #[test]
    fn the_last_bytes_and_a_group_that_has_run_out_are_pressure() {
        let mut pressure = Pressure::default();
        let left = |available| Sample { available: Some(available), ..CALM_SAMPLE };
        assert_eq!(pressure.decide(at(0.0), &left(LAST_BYTES), false), Wish::Keep);
        assert_eq!(pressure.decide(at(1.0), &left(LAST_BYTES - 1), false), Wish::Less);
        let mut small = Pressure::new(&left(100 << 20));
        assert_eq!(small.decide(at(0.0), &left(60 << 20), false), Wish::Keep, "as was planned");
        assert_eq!(small.decide(at(1.0), &left(49 << 20), false), Wish::Less);
        let exhausted = |exhausted| Sample { exhausted, ..CALM_SAMPLE };
        let mut pressure = Pressure::default();
        assert_eq!(pressure.decide(at(0.0), &exhausted(7), false), Wish::Keep, "that was before");
        assert_eq!(pressure.decide(at(1.0), &exhausted(8), false), Wish::Less);
        assert_eq!(pressure.decide(at(5.0), &exhausted(8), true), Wish::Keep);
    }

    #[test]
    fn what_files_say_is_read_and_what_they_do_not_say_is_not_made_up() {
        let some =
            "some avg10=3.25 avg60=1.00 avg300=0.10 total=12345\nfull avg10=90.00 avg60=0.00 avg300=0.00 total=1\n";
        assert_eq!(stalled(some), Some(3.25));
        for wrong in [
            "",
            "full avg10=1.00",
            "some avg10=",
            "some avg60=1.0",
            "some avg10=nan",
            "some avg10=1e9",
            "some avg10=-1",
        ] {
            assert_eq!(stalled(wrong), None, "{wrong}");
        }
        assert_eq!(ran_out("low 0\nhigh 912\nmax 77\noom 2\noom_kill 1\noom_group_kill 5\n"), 3);
        assert_eq!(ran_out("oom many\noom_kill -1\n"), 0);
    }

    #[cfg(not(target_os = "macos"))]
    #[test]
    fn the_worst_of_system_and_groups_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let source =
            || Source { proc: root.path().join("proc"), groups: groups_of("0::/a/b\n", &root.path().join("groups")) };
        assert_eq!(source().sample(), None, "a system without such figures");
        write("proc/pressure/memory", "some avg10=1.50 avg60=0.00 avg300=0.00 total=5\n");
        write("proc/meminfo", "MemTotal: 99 kB\nMemAvailable:     2048 kB\n");
        assert_eq!(source().sample(), Some(Sample { stalled: 1.5, available: Some(2 << 20), exhausted: 0 }));
        write("groups/a/memory.pressure", "some avg10=40.00 avg60=0.00 avg300=0.00 total=5\n");
        write("groups/a/b/memory.pressure", "some avg10=0.00 avg60=0.00 avg300=0.00 total=5\n");
        write("groups/a/b/memory.events", "oom 1\noom_kill 1\n");
        write("groups/a/memory.events", "oom 3\n");
        write("groups/a/memory.max", "3000000\n");
        write("groups/a/memory.current", "2000000\n");
        assert_eq!(source().sample(), Some(Sample { stalled: 40.0, available: Some(1_000_000), exhausted: 5 }));
    }
}
