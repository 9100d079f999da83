//! A pool of threads for tasks of microseconds.
//!
//! A job is a borrowed closure and a number of tasks. The caller opens the job, works on it like the other threads, closes it when
//! no task is left, and waits only for threads that have joined. So a thread that the system has not scheduled in time costs
//! nothing. Threads spin briefly between jobs, then sleep.

use crate::par_slice::Pieces;
use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread spins before it sleeps: a few times what a wake-up costs.
const SPIN: Duration = Duration::from_micros(40);

/// The word `state`: whether the pool ends, whether a job is open, how many workers have joined it, and its number.
const END: usize = 1;
const OPEN: usize = 2;
const JOINED_ONE: usize = 4;
const JOINED_MASK: usize = 0xffff << 2;
const JOB_ONE: usize = 1 << 18;

/// Tasks that a thread takes of a product at a time: what is left, divided by this and by the number of threads. They are adjacent,
/// so that what is prefetched beyond the end of one is what the same thread reads next. One task at a time, two threads
/// of Zen 4 read `q4` 0.85 times as fast. The last ones are single, so threads end together, however unequal their cores are.
const SHARE: usize = 2;

/// As a number of parts: one task at a time.
const SINGLY: usize = usize::MAX;

/// The closure of a job, with its lifetime erased.
type Task = *const (dyn Fn(usize) + Sync);

struct Shared {
    state: AtomicUsize,
    /// Written by the caller while no job is open, read by threads that joined one.
    task: UnsafeCell<Option<Task>>,
    tasks: AtomicUsize,
    next: AtomicUsize,
    /// Into how many parts a thread divides the tasks that are left, to take the first.
    parts: AtomicUsize,
    /// Workers that may join the job. Written like `task`.
    seats: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Workers that sleep or are about to, and the caller if it does.
    sleepers: AtomicUsize,
    caller_sleeps: AtomicUsize,
    lock: Mutex<()>,
    work: Condvar,
    done: Condvar,
}

// SAFETY: only `task` is not Sync by itself. It is written while no job is open and nobody has joined (by the one caller
// that holds `ThreadPool::caller`), and read only by threads that joined an open job; `state` orders the two. The
// closure behind it is Sync.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is never used after the job that it belongs to.
unsafe impl Send for Shared {}

/// Threads that run the tasks of one job at a time together with the caller.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the thread whose job is running.
    caller: Mutex<()>,
    /// While it is set, sparing products leave a core free for others.
    busy: Option<Arc<AtomicBool>>,
    /// Whether memory, not arithmetic, limits the products.
    spares: AtomicBool,
    /// Once it is set, the results of what is running are no longer needed.
    cancel: Mutex<Option<Arc<AtomicBool>>>,
}

/// A poisoned lock does no harm here: the data that it protects are valid at every instant.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ThreadPool {
    /// A pool of `threads` threads including the caller of [`run`](Self::run); 0 counts as 1, and at most 1024 are started. If the
    /// system refuses to start some, the pool works without them.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicUsize::new(0),
            task: UnsafeCell::new(None),
            tasks: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            parts: AtomicUsize::new(SINGLY),
            seats: AtomicUsize::new(0),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            caller_sleeps: AtomicUsize::new(0),
            lock: Mutex::new(()),
            work: Condvar::new(),
            done: Condvar::new(),
        });
        let workers = (1..threads.min(1024))
            .map_while(|i| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new().name(format!("kernels-{i}")).spawn(move || shared.work()).ok()
            })
            .collect();
        ThreadPool {
            shared,
            workers,
            caller: Mutex::new(()),
            busy: None,
            spares: AtomicBool::new(false),
            cancel: Mutex::new(None),
        }
    }

    /// The same pool, except that one thread takes no part in sparing products while `busy` is set.
    #[must_use]
    pub fn sparing_while(mut self, busy: Arc<AtomicBool>) -> Self {
        self.busy = Some(busy);
        self
    }

    /// Sets whether products on this pool are sparing from now on: whether they wait for memory more than they compute. While
    /// something else keeps a core busy ([`sparing_while`](Self::sparing_while)), one thread then takes no part. It would
    /// contribute little, and the others would wait for it whenever the system takes its core away.
    pub fn spare(&self, spares: bool) {
        self.spares.store(spares, Ordering::Relaxed);
    }

    /// From now on, once `flag` is set, products on this pool end early and leave their outputs unfinished. The code that sets it
    /// must discard them.
    pub fn cancel_by(&self, flag: Option<Arc<AtomicBool>>) {
        *lock(&self.cancel) = flag;
    }

    /// The flag that says that results are no longer needed.
    pub fn cancel_flag(&self) -> Option<Arc<AtomicBool>> {
        lock(&self.cancel).clone()
    }

    /// Threads that work on a job, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `f(task)` once for every task in `0..tasks`, on all threads, and returns when all are done.
    ///
    /// Nothing is allocated. While a job runs, further jobs (from inside a task, or from other threads) run on the thread that
    /// submits them.
    ///
    /// # Panics
    /// If a task panics: with its payload, after the running tasks have ended; the remaining ones are not started.
    pub fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        self.run_with(self.workers.len(), SINGLY, tasks, f);
    }

    /// Like [`run`](Self::run), for the tasks of a product: see [`spare`](Self::spare).
    pub(crate) fn run_product(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        let busy = self.busy.as_ref().is_some_and(|busy| busy.load(Ordering::Relaxed));
        let spared = busy && self.spares.load(Ordering::Relaxed);
        let seats = self.workers.len().saturating_sub(usize::from(spared));
        self.run_with(seats, SHARE * (seats + 1), tasks, f);
    }

    /// Runs a job on the calling thread and up to `seats` workers; a thread takes one of `parts` of what is left at a time.
    fn run_with(&self, seats: usize, parts: usize, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        let guard = if tasks > 1 && seats > 0 { self.caller.try_lock().ok() } else { None };
        match guard {
            Some(_guard) => self.run_shared(seats, parts, tasks, f),
            None => (0..tasks).for_each(f),
        }
    }

    /// Splits `data` into pieces of `piece_len`, the last of which may be shorter, and runs `f(i, piece)` for each in
    /// parallel.
    ///
    /// # Panics
    /// If `piece_len` is 0, or as [`run`](Self::run) does.
    pub fn for_each_piece<T: Send>(&self, data: &mut [T], piece_len: usize, f: &(dyn Fn(usize, &mut [T]) + Sync)) {
        assert!(piece_len > 0, "pieces have a length");
        let len = data.len();
        let pieces = Pieces::new(data);
        self.run(len.div_ceil(piece_len), &|i| {
            let at = i * piece_len;
            // SAFETY: pieces of different tasks do not overlap, and `run` runs every task once.
            f(i, unsafe { pieces.piece(at, piece_len.min(len - at)) });
        });
    }

    /// Splits `data` into parts, each of which begins where the one before it ends, and runs `f(i, part)` for each in parallel.
    ///
    /// # Panics
    /// If the ends do not ascend, or `data` is shorter than the last, or as [`run`](Self::run) does.
    pub fn for_each_part<T: Send>(&self, data: &mut [T], ends: &[usize], f: &(dyn Fn(usize, &mut [T]) + Sync)) {
        assert!(ends.is_sorted() && ends.last().is_none_or(|&end| end <= data.len()), "parts follow each other");
        let pieces = Pieces::new(data);
        self.run(ends.len(), &|i| {
            let from = if i == 0 { 0 } else { ends[i - 1] };
            // SAFETY: parts between ascending ends do not overlap, and `run` runs every task once.
            f(i, unsafe { pieces.piece(from, ends[i] - from) });
        });
    }

    /// One job; the caller holds `self.caller`.
    fn run_shared(&self, seats: usize, parts: usize, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The pointer is used by threads that joined the job, and this function does
        // not return before the job is closed and they have all left it.
        let task: Task = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(f) };
        // SAFETY: no job is open and nobody has joined one, so nobody reads; the caller's mutex keeps other writers out.
        unsafe { *shared.task.get() = Some(task) };
        shared.tasks.store(tasks, Ordering::Relaxed);
        shared.next.store(0, Ordering::Relaxed);
        shared.parts.store(parts, Ordering::Relaxed);
        shared.seats.store(seats, Ordering::Relaxed);
        // The next job number, open, nobody joined. SeqCst pairs with the sleepers' check.
        shared.state.fetch_add(JOB_ONE | OPEN, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _lock = lock(&shared.lock);
            shared.work.notify_all();
        }
        shared.take_tasks(f);
        shared.state.fetch_and(!OPEN, Ordering::SeqCst);
        shared.wait_until_left();
        if let Some(payload) = lock(&shared.panic).take() {
            resume_unwind(payload);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.state.fetch_or(END, Ordering::SeqCst);
        {
            let _lock = lock(&self.shared.lock);
            self.shared.work.notify_all();
        }
        for worker in self.workers.drain(..) {
            // Panics of tasks are caught, so a worker has none of its own to report.
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ThreadPool").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

/// Spins until `ready`, or for [`SPIN`]; returns whether it is ready.
fn spin(ready: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..64 {
            if ready() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return false;
        }
    }
}

impl Shared {
    /// The life of a worker: join every open job once.
    fn work(&self) {
        let mut last = 0;
        loop {
            let state = self.wait_for_news(last);
            if state & END != 0 {
                return;
            }
            if (state & JOINED_MASK) / JOINED_ONE >= self.seats.load(Ordering::Relaxed) {
                last = state / JOB_ONE;
                continue;
            }
            // Joining only succeeds while exactly this job is open, so the closure read below is its own.
            let joined = state + JOINED_ONE;
            if self.state.compare_exchange_weak(state, joined, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            last = state / JOB_ONE;
            // SAFETY: having joined, this thread is waited for before `task` is written again.
            if let Some(task) = unsafe { *self.task.get() } {
                // SAFETY: the caller keeps the closure alive until everyone who joined has left.
                self.take_tasks(unsafe { &*task });
            }
            self.leave();
        }
    }

    /// Waits until a job other than `last` is open or the pool ends; returns that state.
    fn wait_for_news(&self, last: usize) -> usize {
        let news = |order| {
            let state = self.state.load(order);
            (state & END != 0 || state & OPEN != 0 && state / JOB_ONE != last).then_some(state)
        };
        if spin(|| news(Ordering::Relaxed).is_some()) {
            // The job may already be over; then sleeping is as good as spinning on.
            if let Some(state) = news(Ordering::Acquire) {
                return state;
            }
        }
        let mut guard = lock(&self.lock);
        // The thread announces itself before it reads the state, and a job is opened before sleepers are counted, so one of the two
        // sees the other.
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        loop {
            if let Some(state) = news(Ordering::SeqCst) {
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
                return state;
            }
            guard = self.work.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes adjacent tasks that nobody has taken yet.
    fn take(&self) -> Option<Range<usize>> {
        let (tasks, parts) = (self.tasks.load(Ordering::Relaxed), self.parts.load(Ordering::Relaxed));
        let end = |first: usize| (first < tasks).then(|| first + ((tasks - first) / parts).max(1));
        let first = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, end).ok()?;
        Some(first..end(first)?)
    }

    /// Runs tasks until none is left.
    fn take_tasks(&self, f: &(dyn Fn(usize) + Sync)) {
        while let Some(taken) = self.take() {
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| taken.for_each(f))) {
                self.next.store(self.tasks.load(Ordering::Relaxed), Ordering::Relaxed);
                lock(&self.panic).get_or_insert(payload);
            }
        }
    }

    fn leave(&self) {
        let before = self.state.fetch_sub(JOINED_ONE, Ordering::SeqCst);
        let last = before & JOINED_MASK == JOINED_ONE;
        if last && before & OPEN == 0 && self.caller_sleeps.load(Ordering::SeqCst) > 0 {
            let _lock = lock(&self.lock);
            self.done.notify_all();
        }
    }

    /// Waits until everyone who joined the closed job has left it.
    fn wait_until_left(&self) {
        let left = || self.state.load(Ordering::SeqCst) & JOINED_MASK == 0;
        if spin(left) {
            return;
        }
        let mut guard = lock(&self.lock);
        self.caller_sleeps.store(1, Ordering::SeqCst);
        while !left() {
            guard = self.done.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_sleeps.store(0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in 0..5 {
            let pool = ThreadPool::new(threads);
            for tasks in (0..200).chain([5000]) {
                let mut counts = vec![0u8; tasks];
                pool.for_each_piece(&mut counts, 1, &|_, c| c[0] += 1);
                assert!(counts.iter().all(|&c| c == 1));
            }
        }
    }

    #[test]
    fn sparing_products_leave_one_thread_out_while_something_else_is_busy() {
        let busy = Arc::new(AtomicBool::new(false));
        for threads in 1..5 {
            let pool = ThreadPool::new(threads).sparing_while(Arc::clone(&busy));
            for (is_busy, spares) in [(true, true), (true, false), (false, true)] {
                busy.store(is_busy, Ordering::Relaxed);
                pool.spare(spares);
                let at_once = AtomicUsize::new(0);
                let most = AtomicUsize::new(0);
                let sum = AtomicUsize::new(0);
                pool.run_product(40, &|i| {
                    most.fetch_max(at_once.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_micros(200));
                    at_once.fetch_sub(1, Ordering::SeqCst);
                    sum.fetch_add(i, Ordering::Relaxed);
                });
                assert_eq!(sum.into_inner(), 780);
                let left = threads - usize::from(is_busy && spares);
                assert!(most.into_inner() <= left.max(1), "{threads} threads");
            }
        }
    }

    #[test]
    fn a_thread_takes_adjacent_tasks_of_a_product() {
        let taken = |tasks: usize, parts: usize| -> Vec<usize> {
            let pool = ThreadPool::new(1);
            pool.shared.tasks.store(tasks, Ordering::Relaxed);
            pool.shared.parts.store(parts, Ordering::Relaxed);
            let taken: Vec<_> = std::iter::from_fn(|| pool.shared.take()).collect();
            assert!(taken.iter().cloned().flatten().eq(0..tasks), "{tasks} tasks: {taken:?}");
            taken.iter().map(Range::len).collect()
        };
        assert_eq!(taken(64, 2 * SHARE), [16, 12, 9, 6, 5, 4, 3, 2, 1, 1, 1, 1, 1, 1, 1]);
        assert_eq!(taken(5, 8 * SHARE), [1; 5]);
        assert_eq!(taken(5, SINGLY), [1; 5]);
        assert_eq!(taken(0, SINGLY), []);
    }

    #[test]
    fn parts_of_any_length_are_run_once() {
        let pool = ThreadPool::new(3);
        let mut data = vec![0; 20];
        let ends = [0, 3, 3, 4, 17];
        pool.for_each_part(&mut data, &ends, &|i, part| part.iter_mut().for_each(|v| *v += 10 + i));
        assert_eq!(data[..4], [11, 11, 11, 13]);
        assert!(data[4..17].iter().all(|&v| v == 14) && data[17..].iter().all(|&v| v == 0));
        pool.for_each_part(&mut data, &[], &|_, _| unreachable!("no parts"));
    }

    #[test]
    #[should_panic(expected = "parts follow each other")]
    fn parts_do_not_overlap() {
        ThreadPool::new(1).for_each_part(&mut [0; 4], &[3, 2], &|_, _| {});
    }

    #[test]
    fn sleeping_threads_wake_up() {
        let pool = ThreadPool::new(3);
        for _ in 0..5 {
            std::thread::sleep(SPIN * 20);
            let sum = AtomicUsize::new(0);
            pool.run(100, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
                std::thread::sleep(Duration::from_micros(5));
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn panics_reach_the_caller_and_the_pool_survives() {
        let pool = ThreadPool::new(3);
        for round in 0..50 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(30, &|i| assert!(i != round % 30, "task {i} failed"));
            }));
            let payload = result.unwrap_err();
            let message = payload.downcast_ref::<String>().unwrap();
            assert_eq!(*message, format!("task {} failed", round % 30));
            let sum = AtomicUsize::new(0);
            pool.run(10, &|i| _ = sum.fetch_add(i, Ordering::Relaxed));
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn jobs_inside_jobs_and_from_many_threads() {
        let pool = ThreadPool::new(2);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for _ in 0..3 {
                s.spawn(|| {
                    for _ in 0..100 {
                        pool.run(4, &|_| pool.run(4, &|i| _ = sum.fetch_add(i, Ordering::Relaxed)));
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 3 * 100 * 4 * 6);
    }

    #[test]
    fn pieces_cover_the_data() {
        let pool = ThreadPool::new(2);
        let mut data = vec![0usize; 103];
        pool.for_each_piece(&mut data, 10, &|i, piece| {
            assert_eq!(piece.len(), if i == 10 { 3 } else { 10 });
            piece.fill(i);
        });
        assert!(data.iter().enumerate().all(|(i, &v)| v == i / 10));
    }
}
