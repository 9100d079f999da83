//! The Linux read engine: one io_uring, one thread, direct reads into registered memory.
//!
//! Files and memory are registered with the kernel if its limits allow that, which saves a lookup and the pinning of
//! pages per read. Memory is registered piece by piece, once all slots of a piece have been filled: registering takes all
//! pages of a piece from the system, and would do so for slots that may never be used. The plain path moves the same bytes; the
//! engine's note says which one is in use and why.

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

/// The kernel's limit for the number of registered buffers.
const BUFFERS_MAX: usize = 1 << 14;

/// Reads through an io_uring.
pub struct UringEngine {
    info: EngineInfo,
    ring: IoUring,
    /// The engine's own descriptors: they outlive the reads.
    files: Vec<File>,
    files_registered: bool,
    /// The mappings whose pieces are registered; none if that is not possible.
    buffers: Vec<Buffers>,
    /// No more memory can be registered, until some has been given back.
    full: bool,
    staged: VecDeque<ChunkRead>,
    /// Reads that were given to the kernel, by tag.
    issued: Vec<Option<ChunkRead>>,
    issued_count: usize,
    waker: Arc<EventWaker>,
    wake_armed: bool,
}

/// The registered buffers of a mapping.
struct Buffers {
    map: Arc<Mapping>,
    /// Place of its first piece in the kernel's table.
    first: u32,
    /// [`Mapping::changes`] when its pieces were looked at.
    seen: Option<u64>,
    /// For each piece that has a place in the table: its generation when it was registered.
    pieces: Vec<Option<u64>>,
}

impl Buffers {
    /// The place in the kernel's table of the piece with this byte, if the kernel has the pages that the mapping shows.
    fn place_of(&self, start: usize) -> Option<u16> {
        let piece = self.map.piece_at(start);
        let registered = self.pieces.get(piece).copied().flatten()?;
        let is_current = registered == self.map.generation(piece);
        is_current.then(|| u16::try_from(self.first as usize + piece).ok()).flatten()
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
        let memory_note = engine.prepare_memory(regions);
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
            buffers: Vec::new(),
            full: false,
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

    /// Makes a table for the pieces of these regions, and registers those that have memory.
    fn prepare_memory(&mut self, regions: &[Region]) -> String {
        let (mut buffers, mut places) = (Vec::with_capacity(regions.len()), 0);
        for Region { map } in regions {
            let count = map.pieces().len().min(BUFFERS_MAX - places);
            buffers.push(Buffers { map: Arc::clone(map), first: places as u32, seen: None, pieces: vec![None; count] });
            places += count;
        }
        if places == 0 {
            return "no memory to register".to_owned();
        }
        if let Err(error) = self.ring.submitter().register_buffers_sparse(places as u32) {
            return format!("memory not registered ({error}; Linux 5.19 can)");
        }
        self.buffers = buffers;
        self.follow_memory();
        explain_memory(regions.iter().map(|region| region.len() as u64).sum())
    }

    /// Registers pieces whose slots all have memory by now, and unregisters those of which memory has been given back: the kernel
    /// would keep their old pages alive, and read into those.
    fn follow_memory(&mut self) {
        let mut buffers = std::mem::take(&mut self.buffers);
        for Buffers { map, first, seen, pieces } in &mut buffers {
            let changes = map.changes();
            if seen.replace(changes) == Some(changes) {
                continue;
            }
            for (piece, ((start, len), registered)) in map.pieces().zip(pieces).enumerate() {
                let (place, generation) = (*first + piece as u32, map.generation(piece));
                if registered.is_some_and(|registered| registered != generation) && self.set_buffer(place, None) {
                    (*registered, self.full) = (None, false);
                }
                let wanted = registered.is_none() && !self.full && len <= BUFFER_BYTES_MAX && map.is_present(piece);
                if wanted {
                    match self.set_buffer(place, Some((map, start, len))) {
                        true => *registered = Some(generation),
                        false => self.full = true,
                    }
                }
            }
        }
        self.buffers = buffers;
    }

    /// Registers a range of a mapping in a place of the table, or empties the place. Reads in flight keep the old buffer. False if
    /// the kernel refuses.
    fn set_buffer(&self, place: u32, range: Option<(&Arc<Mapping>, usize, usize)>) -> bool {
        let (iov_base, iov_len) = match range {
            Some((map, start, len)) => (map.address(start, len).as_ptr().cast(), len),
            None => (std::ptr::null_mut(), 0),
        };
        let vector = [libc::iovec { iov_base, iov_len }];
        // SAFETY: the vector is empty, or a range of a mapping that `self.buffers` keeps alive for as long as the ring: fields are
        // dropped in order, the ring first. Registering pins the pages; bytes are written only by reads, each of which owns its
        // range.
        unsafe { self.ring.submitter().register_buffers_update(place, &vector, None) }.is_ok()
    }

    /// The index of the registered buffer that contains a read's memory, if there is one.
    fn buffer_index(&self, read: &ChunkRead) -> Option<u16> {
        let (map, start) = read.mem.place();
        self.buffers.iter().find(|buffers| Arc::ptr_eq(&buffers.map, map))?.place_of(start)
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
        // Memory that has no pages yet gets them while the read is submitted, one after the other, and slowly where the system has to put huge
        // pages together first. The kernel's own threads do that beside each other.
        let flags = if self.lacks_memory(read) { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        entry.flags(flags).user_data(u64::from(read.tag))
    }

    /// Whether pages may have to be found for the memory of a read.
    fn lacks_memory(&self, read: &ChunkRead) -> bool {
        let (map, start) = read.mem.place();
        !map.is_present(map.piece_at(start))
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
        // The kernel ends a ring some time after it is closed. Until then, what it has pinned would not be available to the next one.
        let _ = self.ring.submitter().unregister_buffers();
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

/// How memory is registered, where `bytes` may be filled in all.
fn explain_memory(bytes: u64) -> String {
    use nix::sys::resource::{Resource, getrlimit};
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((limit, _)) if limit < bytes && !may_lock_all() => format!(
            "memory registered as it is filled, up to the {} MiB that may be locked; `ulimit -l unlimited` lifts that",
            limit >> 20
        ),
        _ => "memory registered as it is filled".to_owned(),
    }
}

/// Whether the limit of locked memory does not apply to this process (`CAP_IPC_LOCK`).
fn may_lock_all() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    set.is_some_and(|set| (set >> CAP_IPC_LOCK) & 1 == 1)
}
