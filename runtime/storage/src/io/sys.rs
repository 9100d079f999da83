//! Thin, safe wrappers of the few system calls that neither std nor nix has.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Alignments that a file wants for direct I/O, in bytes.
#[cfg(target_os = "linux")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirectAlignment {
    /// Of addresses in memory.
    pub(crate) memory_bytes: u32,
    /// Of offsets and lengths; 0: the file does not support direct I/O.
    pub(crate) offset_bytes: u32,
}

/// What `statx` says about direct I/O on a file; `None` if kernel or filesystem do not say.
#[cfg(target_os = "linux")]
pub(crate) fn direct_alignment(file: &File) -> Option<DirectAlignment> {
    let mut stat = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the descriptor is open, the path is an empty C string (AT_EMPTY_PATH makes that
    // mean the descriptor itself), and `stat` is writable memory of the right type.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, stat.as_mut_ptr())
    };
    if result != 0 {
        return None;
    }
    // SAFETY: `statx` is plain old data for which all zeros is a value, and it was zeroed.
    let stat = unsafe { stat.assume_init() };
    (stat.stx_mask & libc::STATX_DIOALIGN != 0)
        .then_some(DirectAlignment { memory_bytes: stat.stx_dio_mem_align, offset_bytes: stat.stx_dio_offset_align })
}

/// True if any page of the range is in the page cache, `None` if the system does not tell.
/// `offset` is a multiple of the page size.
#[cfg(target_os = "linux")]
pub(crate) fn in_page_cache(file: &File, offset: u64, len: usize) -> Option<bool> {
    let mut residency = [0u8; 64];
    let pages = len.div_ceil(super::PAGE_BYTES);
    if pages == 0 || pages > residency.len() {
        return None;
    }
    let offset = libc::off_t::try_from(offset).ok()?;
    // SAFETY: a new shared read-only mapping at an address of the kernel's choice. It is never
    // dereferenced, so that a file that shrinks meanwhile does no harm.
    let address = unsafe {
        let null = std::ptr::null_mut();
        libc::mmap(null, len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), offset)
    };
    if address == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: the range is the mapping above, and `residency` has a byte for each of its pages.
    let result = unsafe { libc::mincore(address, len, residency.as_mut_ptr()) };
    // SAFETY: the mapping was made above and nothing refers to it.
    unsafe { libc::munmap(address, len) };
    (result == 0).then(|| residency[..pages].iter().any(|page| page & 1 != 0))
}

/// Has a write beyond the limit on the size of files (`ulimit -f`) fail with an error, as one on a full drive does. Otherwise the system
/// ends the process with a signal, wherever it is.
pub fn survive_file_size_limit() {
    // SAFETY: the signal exists, and to ignore it installs no code that could be run at any time. `signal` can only fail for signals that
    // do not exist or cannot be ignored.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Tells macOS not to keep what is read from this file in its cache.
#[cfg(target_os = "macos")]
pub(crate) fn set_no_cache(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open, and F_NOCACHE takes an integer and touches no memory.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_NOCACHE, 1) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Pages of memory that the machine has; nix has this query only on other systems.
#[cfg(target_os = "macos")]
pub fn physical_pages() -> Option<i64> {
    // SAFETY: sysconf takes an integer and touches no memory of ours.
    let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
    (pages > 0).then_some(pages)
}

/// How short of memory macOS says it is: 1 is normal, 2 a warning, 4 critical. Other systems have no such number.
pub fn memory_pressure_level() -> Option<u32> {
    #[cfg(target_os = "macos")]
    {
        let (mut level, mut len) = (0u32, size_of::<u32>());
        let name = c"kern.memorystatus_vm_pressure_level";
        // SAFETY: the name is a C string, and `len` says how many bytes there are at `level`.
        let result = unsafe {
            libc::sysctlbyname(name.as_ptr(), (&raw mut level).cast(), &raw mut len, std::ptr::null_mut(), 0)
        };
        (result == 0 && len == size_of::<u32>()).then_some(level)
    }
    #[cfg(not(target_os = "macos"))]
    None
}

/// Asks the allocator to give unused memory back to the system, if it has to be asked.
pub fn trim_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: touches only memory that is free, under the allocator's own locks.
    unsafe {
        libc::malloc_trim(0)
    };
}

/// A non-blocking event counter: written by wakers, polled by the ring.
#[cfg(target_os = "linux")]
pub(crate) fn event_fd() -> io::Result<File> {
    use std::os::fd::{FromRawFd, OwnedFd};
    // SAFETY: takes two integers and touches no memory.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened and has no other owner.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Asks the scheduler to give the calling thread the processor soon after it wakes up, for a short time. A thread that serves
/// a drive works for microseconds, and until it does, the drive is idle.
///
/// Without it, Linux lets a thread that computes finish its slice of milliseconds first, if all cores compute. A shorter
/// slice takes nothing from anyone (`sched_setattr`, `sched_runtime` of SCHED_OTHER: Linux 6.12). On systems without such a
/// setting, nothing happens.
pub(crate) fn ask_for_short_slices() {
    #[cfg(target_os = "linux")]
    {
        /// `struct sched_attr`, first version.
        #[repr(C)]
        #[derive(Default)]
        struct Attributes {
            size: u32,
            policy: u32,
            flags: u64,
            nice: i32,
            priority: u32,
            runtime_ns: u64,
            deadline_ns: u64,
            period_ns: u64,
        }
        /// The shortest that the kernel grants.
        const SLICE_NS: u64 = 100_000;
        const SCHED_FLAG_KEEP_POLICY: u64 = 8;
        // SAFETY: takes no argument, touches no memory.
        let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let size = size_of::<Attributes>() as u32;
        let flags = SCHED_FLAG_KEEP_POLICY;
        let attributes = Attributes { size, flags, nice, runtime_ns: SLICE_NS, ..Attributes::default() };
        // SAFETY: reads `size` bytes of a structure of that size, for the calling thread. A refusal changes nothing.
        unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    }
}

/// Asks that the calling thread's timed waits end on time. Linux lets them end up to 50 µs later, to wake the processor less often,
/// which would make a simulated drive that much slower.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn ask_for_exact_timers() {
    #[cfg(target_os = "linux")]
    {
        const SLACK_NS: libc::c_ulong = 1;
        // SAFETY: takes integers and touches no memory; it concerns the calling thread alone. A refusal changes nothing.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, SLACK_NS) };
    }
}
