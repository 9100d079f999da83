//! The pool of pages, and handles to them. A page is allocated once, when the pool is made; sequences take pages and give them back.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sluice_kernels::KvBuffer;

use super::layout::{Layout, PageKind, PageLayout};

/// The rows of keys, values and latents that layers remember of some tokens, and numbers that are always f32.
#[derive(Debug)]
pub struct Page {
    /// Number of its kind of page.
    kind: usize,
    pub(super) rows: Vec<KvBuffer>,
    pub(super) numbers: Vec<f32>,
}

impl Page {
    fn new(kind: usize, layout: &PageLayout) -> Self {
        let rows = layout.buffers.iter().map(|&(rows, width)| KvBuffer::new(layout.ty, rows, width)).collect();
        Page { kind, rows, numbers: vec![0.0; layout.numbers] }
    }

    /// Bytes that a page with this many buffers takes in addition to their contents: its own fields, its place in the pool, and its
    /// allocations.
    pub(super) fn overhead(buffers: usize) -> u64 {
        const ALLOCATION: usize = 16;
        let counts = 2 * size_of::<usize>() + size_of::<Arc<Page>>();
        let buffer = size_of::<KvBuffer>() + 3 * ALLOCATION;
        (size_of::<Page>() + counts + 3 * ALLOCATION + buffers * buffer) as u64
    }

    /// Copies the contents of another page of the kind.
    pub(super) fn copy(&mut self, from: &Page, layout: &PageLayout) {
        for ((to, from), &(rows, _)) in self.rows.iter_mut().zip(&from.rows).zip(&layout.buffers) {
            to.copy_rows(from, 0..rows);
        }
        self.numbers.copy_from_slice(&from.numbers);
    }
}

/// The pages of all sequences of an engine. It lives as long as any of them.
#[derive(Debug)]
pub struct PagePool {
    layout: Layout,
    /// Pages of each kind.
    total: Vec<usize>,
    /// The free pages of each kind. The lists have room for all pages from the start.
    free: Mutex<Vec<Free>>,
}

/// The free pages of a kind.
#[derive(Debug)]
struct Free {
    pages: Vec<Arc<Page>>,
    /// Free pages whose memory has been given back to the system; they are allocated again when needed.
    away: usize,
}

impl Free {
    fn len(&self) -> usize {
        self.pages.len() + self.away
    }
}

/// How many pages of a kind there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCount {
    /// The contents of the pages.
    pub kind: PageKind,
    /// Bytes of one page.
    pub bytes: u64,
    /// Number of pages.
    pub total: usize,
    /// Number of free pages.
    pub free: usize,
}

/// There are not enough pages of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{wanted} more pages ({kind}) are needed and {free} of {total} are free: end another sequence or save it, or open the model for \
     more sequences or more context"
)]
pub struct PagesFull {
    /// The contents of the pages.
    pub kind: PageKind,
    /// Pages that are needed.
    pub wanted: usize,
    /// Pages that are free.
    pub free: usize,
    /// All pages of the kind.
    pub total: usize,
}

impl PagePool {
    /// A pool of `total` pages of each kind. Large pages take no memory before they are used.
    pub fn new(layout: Layout, total: &[usize]) -> Arc<Self> {
        let pages = layout.pages().iter().enumerate().zip(total);
        let of = |((kind, layout), &n): ((usize, &PageLayout), &usize)| Free {
            pages: (0..n).map(|_| Arc::new(Page::new(kind, layout))).collect(),
            away: 0,
        };
        let free = pages.map(of).collect();
        Arc::new(PagePool { layout, total: total.to_vec(), free: Mutex::new(free) })
    }

    /// Kinds of pages, and where layers have their rows.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// How many pages there are of each kind.
    pub fn counts(&self) -> Vec<PageCount> {
        let free = self.lock();
        let counts = self.layout.pages().iter().zip(&self.total).zip(&*free);
        let count = |((page, &total), free): ((&PageLayout, &usize), &Free)| PageCount {
            kind: page.kind(),
            bytes: page.bytes(),
            total,
            free: free.len(),
        };
        counts.map(count).collect()
    }

    /// An error if fewer than `wanted` pages of a kind are free.
    pub fn check(&self, kind: usize, wanted: usize) -> Result<(), PagesFull> {
        let free = if wanted == 0 { 0 } else { self.lock()[kind].len() };
        match wanted <= free {
            true => Ok(()),
            false => Err(self.full(kind, wanted, free)),
        }
    }

    /// Takes a free page. It still has the contents that its last owner left.
    pub fn take(self: &Arc<Self>, kind: usize) -> Result<Held, PagesFull> {
        let mut free = self.lock();
        let page = match free[kind].pages.pop() {
            None if free[kind].away > 0 => {
                free[kind].away -= 1;
                Some(Arc::new(Page::new(kind, &self.layout.pages()[kind])))
            }
            page => page,
        };
        drop(free);
        let page = page.ok_or_else(|| self.full(kind, 1, 0))?;
        Ok(Held { page: Some(page), pool: Arc::clone(self) })
    }

    /// Gives the memory of free pages back to the system. The pages still count as free and can be taken.
    pub fn give_back(&self) {
        for free in &mut *self.lock() {
            free.away += free.pages.len();
            free.pages.clear();
        }
    }

    fn full(&self, kind: usize, wanted: usize, free: usize) -> PagesFull {
        PagesFull { kind: self.layout.pages()[kind].kind(), wanted, free, total: self.total[kind] }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Free>> {
        // A panic while the lock was held cannot have left the list half changed.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handle to a page that was taken. Clones share the page; the last one to be dropped gives it back to the pool.
#[derive(Debug)]
pub struct Held {
    /// `None` only while the handle is dropped.
    page: Option<Arc<Page>>,
    pool: Arc<PagePool>,
}

impl Held {
    /// The page.
    pub fn get(&self) -> &Page {
        self.arc()
    }

    /// The page, to change it.
    ///
    /// # Panics
    /// If the page is shared: copy it first ([`Held::own`]).
    pub fn get_mut(&mut self) -> &mut Page {
        let page = self.page.as_mut().and_then(Arc::get_mut);
        page.expect("a page that is written was made the sequence's own before")
    }

    /// Whether there are other handles to the page.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(self.arc()) > 1
    }

    /// How many pages have all of their handles among `handles`.
    pub fn alone<'a>(handles: impl Iterator<Item = &'a Held>) -> usize {
        let mut pages: Vec<&Arc<Page>> = handles.map(Held::arc).collect();
        pages.sort_unstable_by_key(|page| Arc::as_ptr(page));
        pages.chunk_by(|a, b| Arc::ptr_eq(a, b)).filter(|same| same.len() == Arc::strong_count(same[0])).count()
    }

    /// A copy of the page that is not shared, from the same pool.
    pub fn own(&self) -> Result<Held, PagesFull> {
        let kind = self.arc().kind;
        let mut own = self.pool.take(kind)?;
        own.get_mut().copy(self.arc(), &self.pool.layout.pages()[kind]);
        Ok(own)
    }

    fn arc(&self) -> &Arc<Page> {
        self.page.as_ref().expect("it is there until it is dropped")
    }
}

impl Clone for Held {
    fn clone(&self) -> Self {
        Held { page: self.page.clone(), pool: Arc::clone(&self.pool) }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(page) = self.page.take() else { return };
        // Handles are dropped one at a time, under the lock. So exactly one finds that it is the last, and no other handle is left
        // that could be cloned meanwhile.
        let mut free = self.pool.lock();
        match Arc::strong_count(&page) {
            1 => free[page.kind].pages.push(page),
            // Still under the lock: if this handle were counted after it was dropped, the last one could not tell that it is the
            // last.
            _ => drop(page),
        }
    }
}
