//! The order in which chunks are issued. Pure: events in, next chunk out; no file, no clock.
//!
//! Demand reads come before prefetch reads. Within a class, chunks are issued in the order of arrival, extent by
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
    prefetch: Line,
}

impl ChunkQueue {
    /// An empty queue with room for `requests` requests.
    #[must_use]
    pub fn with_capacity(requests: usize) -> Self {
        Self { demand: Line::with_capacity(requests), prefetch: Line::with_capacity(requests) }
    }

    fn line(&mut self, class: Class) -> &mut Line {
        match class {
            Class::Demand => &mut self.demand,
            Class::Prefetch => &mut self.prefetch,
        }
    }

    /// Adds a request of which nothing has been issued.
    pub fn add(&mut self, request: u32, class: Class) {
        self.line(class).push_back(request);
    }

    /// Removes a request, wherever it is. Does nothing if it is not queued.
    pub fn remove(&mut self, request: u32) {
        for line in [&mut self.demand, &mut self.prefetch] {
            line.retain(|&queued| queued != request);
        }
    }

    /// Turns a prefetch into a demand: it goes behind the demands that are waiting.
    pub fn promote(&mut self, request: u32) {
        if let Some(at) = self.prefetch.iter().position(|&queued| queued == request) {
            self.prefetch.remove(at);
            self.demand.push_back(request);
        }
    }

    /// True if no demand is waiting to be issued.
    #[must_use]
    pub fn demand_is_empty(&self) -> bool {
        self.demand.is_empty()
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
        for class in [Class::Demand, Class::Prefetch] {
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
    fn demand_before_prefetch_then_extent_by_extent() {
        let mut queue = ChunkQueue::with_capacity(4);
        queue.add(0, Class::Prefetch);
        queue.add(1, Class::Demand);
        queue.add(2, Class::Demand);
        queue.add(3, Class::Demand);
        let order = drain(&mut queue, &mut [2, 3, 1, 2]);
        assert_eq!(order, [1, 1, 1, 2, 3, 3, 0, 0]);
        assert!(queue.demand_is_empty());
    }

    #[test]
    fn removal_and_promotion() {
        let mut queue = ChunkQueue::with_capacity(4);
        queue.add(0, Class::Prefetch);
        queue.add(1, Class::Prefetch);
        queue.add(2, Class::Demand);
        assert_eq!(queue.next(Class::Prefetch, |_| Issuable::More), Some(0));
        queue.promote(1);
        queue.promote(0);
        queue.remove(2);
        assert_eq!(drain(&mut queue, &mut [1, 2, 9]), [1, 1, 0]);
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
        assert!(!queue.demand_is_empty());
    }
}
