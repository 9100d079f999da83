//! Handing out the experts of a pass in ascending order.
//!
//! Experts whose outputs are added to running sums must come in the order of summation. Reads are submitted in that order too,
//! so usually the next expert is the next to arrive. Experts in memory wait for their turn, pinned; when no slot is left for
//! the one whose turn it is, the last of them gives up its slot and is read again later.

use super::{Content, Key, Pool, PoolError};

/// Where the next expert of a pass is.
enum Next {
    /// In this slot, pinned.
    Ready(u32),
    /// Being read, at this place in the list of pending reads.
    Pending(usize),
    /// Without a slot.
    Todo,
}

impl Pool {
    /// The slot of the lowest expert of the pass that has not been handed out, pinned; `None` when all have been.
    pub(super) fn next_in_order(&mut self) -> Result<Option<u32>, PoolError> {
        loop {
            if let Some(error) = self.pass.failed.take() {
                return Err(error);
            }
            match self.lowest() {
                None => return Ok(None),
                Some(Next::Ready(number)) => {
                    self.pass.ready.pop_front();
                    return Ok(Some(number));
                }
                Some(Next::Pending(at)) => {
                    self.wait_for(at);
                    let number = self.pass.pending.swap_remove(at).slot;
                    self.finish_read(number, 1)?;
                    self.submit_staged();
                    return Ok(Some(number));
                }
                Some(Next::Todo) => {
                    let before = self.pass.todo.len();
                    self.submit_missing();
                    let stuck = self.pass.todo.len() == before && self.pass.failed.is_none();
                    if stuck && !self.reclaim_for_pass() && !self.land_one()? && !self.give_up_last() {
                        return Err(PoolError::NoSlots);
                    }
                }
            }
        }
    }

    fn lowest(&self) -> Option<Next> {
        let key = |number: u32| match &self.slots[number as usize] {
            Content::Resident { expert, .. } | Content::Loading { expert, .. } => *expert,
            _ => unreachable!("a slot of the pass holds an expert"),
        };
        // Ready and waiting experts are ascending; so are reads, except for a repeated one.
        let ready = self.pass.ready.front().map(|&number| (key(number), Next::Ready(number)));
        let pending = self.pass.pending.iter().enumerate();
        let pending = pending.map(|(at, pending)| (key(pending.slot), Next::Pending(at))).min_by_key(|next| next.0);
        let todo = self.pass.todo.front().map(|&key| (key, Next::Todo));
        [ready, pending, todo].into_iter().flatten().min_by_key(|next| next.0).map(|next| next.1)
    }

    /// Ends the read of a compressed expert whose turn has not come, to free its staging slot; false if there is none.
    fn land_one(&mut self) -> Result<bool, PoolError> {
        let packed = (0..self.pass.pending.len()).find(|&at| self.is_packed(self.pass.pending[at].slot));
        let Some(at) = packed else { return Ok(false) };
        self.wait_for(at);
        let number = self.pass.pending.swap_remove(at).slot;
        self.finish_read(number, 1)?;
        let expert = |number: u32| match &self.slots[number as usize] {
            Content::Resident { expert, .. } => *expert,
            _ => unreachable!("a slot of the pass holds an expert"),
        };
        let place = self.pass.ready.iter().position(|&ready| expert(ready) > expert(number));
        self.pass.ready.insert(place.unwrap_or(self.pass.ready.len()), number);
        Ok(true)
    }

    /// Takes the slot from the last expert that waits for its turn; false if there is none.
    fn give_up_last(&mut self) -> bool {
        let Some(number) = self.pass.ready.pop_back() else { return false };
        let Content::Resident { expert, .. } = self.slots[number as usize] else {
            unreachable!("a pinned slot is resident")
        };
        self.unpin(number);
        let at = self.pass.todo.partition_point(|&waiting: &Key| waiting < expert);
        self.pass.todo.insert(at, expert);
        // The policy may choose another victim, but there is now one that is not pinned.
        true
    }
}
