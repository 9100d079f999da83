//! Simulated drives.
//!
//! [`SimDrive`] is a drive in memory, with a seed and faults, for tests of everything above it. [`SimulatedDrive`] has a speed and no
//! faults, and costs no processor time; it is for measurements.
//!
//! Reads of a [`SimDrive`] complete in a random order. Faults are set per byte range through [`SimDrive`]. It also
//! counts how often each has fired, so a test can prove that it tested something.

mod timed;
mod timing;

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::arena::PAGE_BYTES;
use super::error::FileInfo;
use super::{ChunkRead, Completion, EngineInfo, ReadEngine, Wait, Wake};

pub use timed::{DriveUse, SimulatedDrive};
pub use timing::{Bus, DriveSpeed};

/// What goes wrong with a read that touches a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The read fails with EIO.
    Eio,
    /// One bit of the range's first byte comes out flipped.
    Flip,
    /// The read returns only its first half, in whole pages. A read of one page is not affected.
    Short,
    /// The read returns no bytes, as if the file had been cut off.
    Cut,
    /// The read fails because the system gives no memory for its bytes.
    NoMemory,
}

/// A fault: what, where and how often.
#[derive(Clone, Debug)]
pub struct Fault {
    /// What goes wrong.
    pub kind: FaultKind,
    /// Index of the file.
    pub file: u16,
    /// Byte range; a read that overlaps it is affected.
    pub range: Range<u64>,
    /// How many reads it affects; `u32::MAX` is for ever.
    pub times: u32,
}

/// The test's handle on a [`SimEngine`]: files, faults, and a log of what was read.
#[derive(Clone)]
pub struct SimDrive {
    shared: Arc<Shared>,
}

struct Shared {
    files: Vec<Vec<u8>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    faults: Vec<Fault>,
    fired: [u64; 5],
    short_permille: u32,
    /// How many more reads may complete; `None`: all of them.
    quota: Option<usize>,
    log: Vec<(u16, u64, usize)>,
    woken: bool,
}

impl SimDrive {
    /// A drive with these files, and no faults.
    #[must_use]
    pub fn new(files: Vec<Vec<u8>>) -> Self {
        let shared = Shared { files, state: Mutex::new(State::default()), changed: Condvar::new() };
        Self { shared: Arc::new(shared) }
    }

    /// An engine on this drive. The seed decides the order of completions and random faults.
    #[must_use]
    pub fn engine(&self, depth: usize, seed: u64) -> SimEngine {
        let describe =
            |(number, bytes): (usize, &Vec<u8>)| FileInfo::new(Path::new(&format!("sim:{number}")), bytes.len() as u64);
        let info = EngineInfo {
            name: "sim",
            note: format!("a drive in memory, seed {seed}"),
            depth,
            files: self.shared.files.iter().enumerate().map(describe).collect(),
        };
        SimEngine {
            info,
            shared: Arc::clone(&self.shared),
            staged: VecDeque::with_capacity(depth),
            issued: Vec::with_capacity(depth),
            random: Random(seed),
        }
    }

    /// Adds a fault.
    pub fn add_fault(&self, fault: Fault) {
        self.lock().faults.push(fault);
    }

    /// Removes all faults.
    pub fn heal(&self) {
        let mut state = self.lock();
        state.faults.clear();
        state.short_permille = 0;
    }

    /// Makes this many of 1000 reads short, at random.
    pub fn set_short_reads(&self, permille: u32) {
        self.lock().short_permille = permille;
    }

    /// How many reads faults of this kind have affected.
    #[must_use]
    pub fn fired(&self, kind: FaultKind) -> u64 {
        self.lock().fired[kind as usize]
    }

    /// Stops completions until [`release`](Self::release): reads stay in flight.
    pub fn hold(&self) {
        self.let_through(0);
    }

    /// Lets this many reads complete, and then holds the others.
    pub fn let_through(&self, reads: usize) {
        self.lock().quota = Some(reads);
        self.shared.changed.notify_all();
    }

    /// Lets reads complete again.
    pub fn release(&self) {
        self.lock().quota = None;
        self.shared.changed.notify_all();
    }

    /// Reads issued so far: file, offset, bytes asked for; in the order of issue.
    #[must_use]
    pub fn log(&self) -> Vec<(u16, u64, usize)> {
        self.lock().log.clone()
    }

    /// Forgets the log.
    pub fn clear_log(&self) {
        self.lock().log.clear();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The first fault that affects a read, counted as fired.
    fn strike(&mut self, file: u16, range: &Range<u64>) -> Option<(FaultKind, u64)> {
        let fault = self.faults.iter_mut().find(|fault| {
            fault.times > 0 && fault.file == file && fault.range.start < range.end && range.start < fault.range.end
        })?;
        if fault.times != u32::MAX {
            fault.times -= 1;
        }
        self.fired[fault.kind as usize] += 1;
        Some((fault.kind, fault.range.start.max(range.start)))
    }
}

/// SplitMix64: enough randomness for an order of completions.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((word ^ (word >> 31)) % bound.max(1) as u64) as usize
    }
}

/// A read engine on a [`SimDrive`].
pub struct SimEngine {
    info: EngineInfo,
    shared: Arc<Shared>,
    staged: VecDeque<ChunkRead>,
    issued: Vec<ChunkRead>,
    random: Random,
}

impl SimEngine {
    /// Does one read, with whatever goes wrong with it.
    fn perform(&mut self, mut read: ChunkRead, state: &mut State) -> Completion {
        let file = &self.shared.files[usize::from(read.file)];
        let start = read.offset.min(file.len() as u64) as usize;
        let mut len = read.mem.len().min(file.len() - start);
        let range = read.offset..read.offset + len as u64;
        let fault = state.strike(read.file, &range);
        let random_short = self.random.below(1000) < state.short_permille as usize;
        let result = match fault {
            Some((FaultKind::Eio, _)) => Err(io::Error::from_raw_os_error(libc::EIO)),
            Some((FaultKind::Cut, _)) => Ok(0),
            Some((FaultKind::NoMemory, _)) => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
            _ => {
                let short = matches!(fault, Some((FaultKind::Short, _)));
                if (short || random_short) && len > PAGE_BYTES {
                    len = (len / 2).next_multiple_of(PAGE_BYTES).min(len - PAGE_BYTES);
                    state.fired[FaultKind::Short as usize] += u64::from(!short);
                }
                read.mem.as_mut_slice()[..len].copy_from_slice(&file[start..start + len]);
                if let Some((FaultKind::Flip, at)) = fault {
                    let at = (at - read.offset) as usize;
                    read.mem.as_mut_slice()[at] ^= 0x10;
                }
                Ok(len)
            }
        };
        Completion { tag: read.tag, mem: read.mem, result }
    }
}

impl ReadEngine for SimEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn submit(&mut self, read: ChunkRead) {
        assert!(usize::from(read.file) < self.shared.files.len(), "no such file");
        let accepted = self.staged.len() + self.issued.len();
        assert!(accepted < self.info.depth, "more reads than the engine's depth");
        self.staged.push_back(read);
    }

    fn cancel(&mut self, tag: u32) -> Option<ChunkRead> {
        let at = self.staged.iter().position(|read| read.tag == tag)?;
        self.staged.remove(at)
    }

    fn complete(&mut self, ended: &mut Vec<Completion>, wait: Wait) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        for read in self.staged.drain(..) {
            state.log.push((read.file, read.offset, read.mem.len()));
            self.issued.push(read);
        }
        let deadline = match wait {
            Wait::Timeout(timeout) => Instant::now().checked_add(timeout),
            Wait::Poll | Wait::Forever => None,
        };
        while wait != Wait::Poll && !state.woken && (state.quota == Some(0) || self.issued.is_empty()) {
            let Some(deadline) = deadline else {
                state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let result = shared.changed.wait_timeout(state, left);
            state = result.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.woken = false;
        if state.quota == Some(0) || self.issued.is_empty() {
            return Ok(());
        }
        let most = 1 + self.random.below(self.issued.len());
        let reads = state.quota.map_or(most, |quota| most.min(quota));
        state.quota = state.quota.map(|quota| quota - reads);
        for _ in 0..reads {
            let read = self.issued.swap_remove(self.random.below(self.issued.len()));
            let completion = self.perform(read, &mut state);
            ended.push(completion);
        }
        Ok(())
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.shared) as Arc<dyn Wake>
    }
}

impl Wake for Shared {
    fn wake(&self) {
        self.lock().woken = true;
        self.changed.notify_all();
    }
}
