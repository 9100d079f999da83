//! The Linux read engine: one io_uring, one thread, direct reads into registered memory.
//!
//! Files and memory are registered with the kernel if its limits allow that, which saves a lookup and the pinning of
//! pages per read. The plain path moves the same bytes; the engine's note says which one is in use and why.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::types::{Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};

use super::arena::{Mapping, Region};
use super::file::DataFile;
use super::{ChunkRead, Completion, EngineInfo, ReadEngine, Wait, Wake, sys};

/// `user_data` of the poll that wakers end; chunk tags are 32 bits and never collide with it.
const WAKE_TAG: u64 = u64::MAX;

/// The kernel's limit for one registered buffer.
const BUFFER_BYTES_MAX: usize = 1 << 30;

/// Distance between the starts of registered buffers of one mapping. They overlap by 16 MiB, so
/// that every chunk lies within one of them.
const BUFFER_STRIDE_BYTES: usize = BUFFER_BYTES_MAX - (16 << 20);

/// Reads through an io_uring.
pub struct UringEngine {
    info: EngineInfo,
    ring: IoUring,
    /// The engine's own descriptors: they outlive the reads.
    files: Vec<File>,
    files_registered: bool,
    /// The memory to be registered; none if that has failed.
    regions: Vec<Region>,
    /// The registered mappings.
    buffers: Vec<Registered>,
    staged: VecDeque<ChunkRead>,
    /// Reads that were given to the kernel, by tag.
    issued: Vec<Option<ChunkRead>>,
    issued_count: usize,
    waker: Arc<EventWaker>,
    wake_armed: bool,
}

/// A mapping that is registered with the kernel.
struct Registered {
    map: Arc<Mapping>,
    /// Where its buffers begin in the kernel's table.
    first: usize,
    /// The mapping's number at the time when it was registered.
    generation: u64,
}

impl Registered {
    /// Whether the kernel has the pages that the mapping shows.
    fn is_current(&self) -> bool {
        self.generation == self.map.generation()
    }
}

struct EventWaker(File);

impl Wake for EventWaker {
    fn wake(&self) {
        // Fails only if the counter is at its maximum: then a wake-up is pending already.
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }
}

impl UringEngine {
    /// Sets up a ring for `depth` reads in flight, and registers files and memory.
    ///
    /// # Errors
    /// Says in words why this system has no usable io_uring.
    pub fn new(files: &[DataFile], regions: &[Region], depth: usize) -> Result<Self, String> {
        let mut engine = Self::plain(files, depth)?;
        let files_note = engine.register_files();
        let memory_note = engine.register_memory(regions);
        engine.info.note = format!("io_uring, {files_note}, {memory_note}");
        Ok(engine)
    }

    /// Sets up a ring for `depth` reads in flight, and registers nothing.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn plain(files: &[DataFile], depth: usize) -> Result<Self, String> {
        let entries = u32::try_from(depth + 2).map_err(|_| "the depth is too large")?;
        let ring = IoUring::new(entries).map_err(|error| explain_setup(&error))?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err("the kernel's io_uring is too old (5.11 is needed)".to_owned());
        }
        let note = "io_uring, nothing registered".to_owned();
        let info = EngineInfo { name: "uring", note, depth, files: files.iter().map(DataFile::info).collect() };
        let own = files.iter().map(DataFile::duplicate).collect::<io::Result<Vec<_>>>();
        let wake_file = sys::event_fd().map_err(|error| format!("no eventfd: {error}"))?;
        Ok(Self {
            info,
            ring,
            files: own.map_err(|error| format!("no more descriptors: {error}"))?,
            files_registered: false,
            regions: Vec::new(),
            buffers: Vec::new(),
            staged: VecDeque::with_capacity(depth),
            issued: (0..depth).map(|_| None).collect(),
            issued_count: 0,
            waker: Arc::new(EventWaker(wake_file)),
            wake_armed: false,
        })
    }

    fn register_files(&mut self) -> String {
        let descriptors: Vec<_> = self.files.iter().map(AsRawFd::as_raw_fd).collect();
        match self.ring.submitter().register_files(&descriptors) {
            Ok(()) => {
                self.files_registered = true;
                "files registered".to_owned()
            }
            Err(error) => format!("files not registered ({error})"),
        }
    }

    fn register_memory(&mut self, regions: &[Region]) -> String {
        let mut vectors = Vec::new();
        let mut buffers = Vec::new();
        for Region { map } in regions {
            let (map, generation) = (Arc::clone(map), map.generation());
            buffers.push(Registered { map: Arc::clone(&map), first: vectors.len(), generation });
            for start in (0..map.len()).step_by(BUFFER_STRIDE_BYTES) {
                let len = BUFFER_BYTES_MAX.min(map.len() - start);
                let base = map.address(start, len).as_ptr().cast();
                vectors.push(libc::iovec { iov_base: base, iov_len: len });
            }
        }
        if vectors.is_empty() {
            return "no memory to register".to_owned();
        }
        // SAFETY: each vector is a range of a mapping that `self.buffers` keeps alive for as
        // long as the ring: fields are dropped in order, the ring first. Registering pins the
        // pages; bytes are written only by reads, each of which owns its range.
        let result = unsafe { self.ring.submitter().register_buffers(&vectors) };
        let bytes: usize = regions.iter().map(Region::len).sum();
        match result {
            Ok(()) => {
                self.buffers = buffers;
                self.regions = regions.to_vec();
                "memory registered".to_owned()
            }
            Err(error) => format!("memory not registered ({})", explain_memory(&error, bytes)),
        }
    }

    /// Unregisters memory when parts of it have been given back to the system: the kernel would keep their old pages alive,
    /// and read into those. Registers the memory again once all of it has been taken again.
    fn follow_memory(&mut self) {
        if !self.buffers.iter().all(Registered::is_current) {
            // Kernels before 5.13 wait for everything in flight, the poll as well.
            self.waker.wake();
            if self.ring.submitter().unregister_buffers().is_ok() {
                self.buffers.clear();
            }
        }
        if self.buffers.is_empty() && self.regions.iter().all(|region| region.map.is_whole()) {
            // If memory cannot be registered now, this is not tried again.
            let regions = std::mem::take(&mut self.regions);
            self.register_memory(&regions);
        }
    }

    /// The index of the registered buffer that contains a read's memory, if there is one.
    fn buffer_index(&self, read: &ChunkRead) -> Option<u16> {
        let (map, start) = read.mem.place();
        let known = self.buffers.iter().find(|known| Arc::ptr_eq(&known.map, map) && known.is_current())?;
        let piece = start / BUFFER_STRIDE_BYTES;
        let fits = start + read.mem.len() <= piece * BUFFER_STRIDE_BYTES + BUFFER_BYTES_MAX;
        if fits { u16::try_from(known.first + piece).ok() } else { None }
    }

    fn entry(&self, read: &ChunkRead) -> squeue::Entry {
        let address = read.mem.address();
        let len = u32::try_from(read.mem.len()).unwrap_or(u32::MAX);
        let file = &self.files[usize::from(read.file)];
        let fixed = Fixed(u32::from(read.file));
        let plain = Fd(file.as_raw_fd());
        let entry = match (self.buffer_index(read), self.files_registered) {
            (Some(buffer), true) => opcode::ReadFixed::new(fixed, address, len, buffer).offset(read.offset).build(),
            (Some(buffer), false) => opcode::ReadFixed::new(plain, address, len, buffer).offset(read.offset).build(),
            (None, true) => opcode::Read::new(fixed, address, len).offset(read.offset).build(),
            (None, false) => opcode::Read::new(plain, address, len).offset(read.offset).build(),
        };
        entry.user_data(u64::from(read.tag))
    }

    /// Moves staged reads, and the wake-up poll, into the submission queue.
    fn stage(&mut self) {
        if !self.wake_armed {
            let poll = opcode::PollAdd::new(Fd(self.waker.0.as_raw_fd()), libc::POLLIN as u32);
            let entry = poll.build().user_data(WAKE_TAG);
            // SAFETY: a poll touches no memory; its descriptor lives as long as the ring.
            self.wake_armed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        }
        while let Some(read) = self.staged.pop_front() {
            let entry = self.entry(&read);
            // SAFETY: the read's memory is owned by its `ChunkMem`, which stays in `issued`
            // until the completion has been seen, or for ever; so do file and mapping.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                self.staged.push_front(read);
                return;
            }
            let tag = read.tag as usize;
            self.issued[tag] = Some(read);
            self.issued_count += 1;
        }
    }

    /// Submits to the kernel, and waits for at least one completion if `wait` says so.
    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        let have = !self.ring.completion().is_empty();
        let want = usize::from(wait != Wait::Poll && !have);
        if want == 0 && self.ring.submission().is_empty() {
            return Ok(());
        }
        let result = match wait {
            Wait::Timeout(timeout) if want == 1 => {
                let timespec = Timespec::from(timeout);
                let args = SubmitArgs::new().timespec(&timespec);
                self.ring.submitter().submit_with_args(want, &args)
            }
            _ => self.ring.submit_and_wait(want),
        };
        match result {
            Ok(_) => Ok(()),
            // Interrupted, out of time, or the kernel is short of memory or completion slots:
            // what was not taken stays in the queue for the next call.
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Appends the reads that the kernel has completed.
    fn reap(&mut self, ended: &mut Vec<Completion>) {
        for entry in self.ring.completion() {
            if entry.user_data() == WAKE_TAG {
                self.wake_armed = false;
                let mut count = [0u8; 8];
                // Empty if another wake-up was read together with this one.
                let _ = (&self.waker.0).read(&mut count);
                continue;
            }
            let slot = usize::try_from(entry.user_data()).ok().and_then(|t| self.issued.get_mut(t));
            let Some(read) = slot.and_then(Option::take) else {
                continue;
            };
            self.issued_count -= 1;
            let result = usize::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()));
            ended.push(Completion { tag: read.tag, mem: read.mem, result });
        }
    }
}

impl ReadEngine for UringEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn submit(&mut self, read: ChunkRead) {
        assert!(usize::from(read.file) < self.files.len(), "no such file");
        let accepted = self.staged.len() + self.issued_count;
        assert!(accepted < self.info.depth, "more reads than the engine's depth");
        assert!(self.issued[read.tag as usize].is_none(), "a tag that is in use");
        self.staged.push_back(read);
    }

    fn cancel(&mut self, tag: u32) -> Option<ChunkRead> {
        let at = self.staged.iter().position(|read| read.tag == tag)?;
        self.staged.remove(at)
    }

    fn complete(&mut self, ended: &mut Vec<Completion>, wait: Wait) -> io::Result<()> {
        self.follow_memory();
        self.stage();
        self.enter(wait)?;
        self.reap(ended);
        Ok(())
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.waker) as Arc<dyn Wake>
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        let mut ended = Vec::new();
        while self.issued_count > 0 {
            if self.ring.submit_and_wait(1).is_err_and(|e| e.raw_os_error() != Some(libc::EINTR)) {
                // The kernel may still write: the memory is given up rather than reused.
                std::mem::forget(std::mem::take(&mut self.issued));
                return;
            }
            self.reap(&mut ended);
        }
    }
}

fn explain_setup(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => "the kernel has no io_uring".to_owned(),
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is forbidden here (container policy or kernel.io_uring_disabled)".to_owned()
        }
        Some(libc::ENOMEM) => "too little lockable memory (`ulimit -l`) for a ring".to_owned(),
        _ => format!("io_uring cannot be set up: {error}"),
    }
}

fn explain_memory(error: &io::Error, bytes: usize) -> String {
    use nix::sys::resource::{Resource, getrlimit};
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map(|(soft, _)| soft);
    match (error.raw_os_error(), limit) {
        (Some(libc::ENOMEM), Ok(limit)) => format!(
            "{} MiB of slots exceed the {} MiB that may be locked; `ulimit -l unlimited` lifts it",
            bytes >> 20,
            limit >> 20
        ),
        _ => error.to_string(),
    }
}
