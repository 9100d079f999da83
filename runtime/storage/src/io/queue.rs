//! The order in which chunks are issued. Pure: events in, next chunk out; no file, no clock.
//!
//! Demand reads come first, then those that are certain to be asked for, then prefetch reads. Within a class, chunks are issued in the order of arrival, extent by
//! extent: experts are computed one after the other, so they should arrive one after the other, not all at the end.

use std::collections::VecDeque;

use super::scheduler::Class;

/// What a request can issue now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Issuable {
    /// Its next chunk, which is not its last.
    More,
    /// Its next chunk, which is its last.
    Last,
    /// Nothing now, but something later.
    Blocked,
}

/// In the order in which they are to be issued.
type Line = VecDeque<u32>;

/// Requests with chunks still to be issued, in the order in which they are to be issued.
#[derive(Debug, Default)]
pub struct ChunkQueue {
    demand: Line,
    certain: Line,
    prefetch: Line,
}

impl ChunkQueue {
    /// An empty queue with room for `requests` requests.
    #[must_use]
    pub fn with_capacity(requests: usize) -> Self {
        let line = || Line::with_capacity(requests);
        Self { demand: line(), certain: line(), prefetch: line() }
    }

    fn line(&mut self, class: Class) -> &mut Line {
        match class {
            Class::Demand => &mut self.demand,
            Class::Certain => &mut self.certain,
            Class::Prefetch => &mut self.prefetch,
        }
    }

    /// Adds a request of which nothing has been issued.
    pub fn add(&mut self, request: u32, class: Class) {
        self.line(class).push_back(request);
    }

    /// Removes a request, wherever it is. Does nothing if it is not queued.
    pub fn remove(&mut self, request: u32) {
        for line in [&mut self.demand, &mut self.certain, &mut self.prefetch] {
            line.retain(|&queued| queued != request);
        }
    }

    /// Turns another read into a demand: it goes behind the demands that are waiting.
    pub fn promote(&mut self, request: u32) {
        for line in [&mut self.certain, &mut self.prefetch] {
            if let Some(at) = line.iter().position(|&queued| queued == request) {
                line.remove(at);
                self.demand.push_back(request);
                return;
            }
        }
    }

    /// True if no request of this class is waiting to be issued.
    #[must_use]
    pub fn is_empty(&self, class: Class) -> bool {
        match class {
            Class::Demand => self.demand.is_empty(),
            Class::Certain => self.certain.is_empty(),
            Class::Prefetch => self.prefetch.is_empty(),
        }
    }

    /// The request of `class` whose next chunk has to be issued now. The caller must issue it: the queue counts it as
    /// issued.
    pub fn next(&mut self, class: Class, mut issuable: impl FnMut(u32) -> Issuable) -> Option<u32> {
        let line = self.line(class);
        for at in 0..line.len() {
            let request = line[at];
            match issuable(request) {
                Issuable::More => return Some(request),
                Issuable::Last => return line.remove(at),
                Issuable::Blocked => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the queue dry; `chunks[r]` is the number of chunks of request `r`.
    fn drain(queue: &mut ChunkQueue, chunks: &mut [u32]) -> Vec<u32> {
        let mut order = Vec::new();
        for class in [Class::Demand, Class::Certain, Class::Prefetch] {
            while let Some(request) =
                queue.next(class, |request| if chunks[request as usize] > 1 { Issuable::More } else { Issuable::Last })
            {
                chunks[request as usize] -= 1;
                order.push(request);
            }
        }
        order
    }

    #[test]
    fn class_by_class_then_extent_by_extent() {
        let mut queue = ChunkQueue::with_capacity(4);
        queue.add(0, Class::Prefetch);
        queue.add(4, Class::Certain);
        queue.add(1, Class::Demand);
        queue.add(2, Class::Demand);
        queue.add(3, Class::Demand);
        let order = drain(&mut queue, &mut [2, 3, 1, 2, 2]);
        assert_eq!(order, [1, 1, 1, 2, 3, 3, 4, 4, 0, 0]);
        assert!(queue.is_empty(Class::Demand));
    }

    #[test]
    fn removal_and_promotion() {
        let mut queue = ChunkQueue::with_capacity(4);
        queue.add(0, Class::Prefetch);
        queue.add(1, Class::Prefetch);
        queue.add(2, Class::Demand);
        assert_eq!(queue.next(Class::Prefetch, |_| Issuable::More), Some(0));
        queue.add(3, Class::Certain);
        queue.promote(1);
        queue.promote(3);
        queue.promote(0);
        queue.remove(2);
        assert_eq!(drain(&mut queue, &mut [1, 2, 9, 1]), [1, 1, 3, 0]);
    }

    #[test]
    fn a_blocked_request_lets_others_pass() {
        let mut queue = ChunkQueue::with_capacity(2);
        queue.add(0, Class::Demand);
        queue.add(1, Class::Demand);
        assert_eq!(queue.next(Class::Demand, |_| Issuable::More), Some(0));
        let one_blocked = |request| {
            if request == 0 { Issuable::Blocked } else { Issuable::Last }
        };
        assert_eq!(queue.next(Class::Demand, one_blocked), Some(1));
        assert_eq!(queue.next(Class::Demand, one_blocked), None);
        assert!(!queue.is_empty(Class::Demand));
    }
}
