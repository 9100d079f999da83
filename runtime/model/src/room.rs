//! Whether there are pages for what sequences are about to take, before any of them changes.

use crate::Sequence;
use crate::cache::{PageKind, PagePool, PagesFull, Table};

/// An error if the pool has too few free pages for these sequences to take so many tokens each, in one step with passes of at most
/// `rows` rows.
pub(crate) fn check<'a>(
    pool: &PagePool,
    appends: impl Iterator<Item = (&'a Sequence, usize)> + Clone,
    rows: usize,
) -> Result<(), PagesFull> {
    for (number, page) in pool.layout().pages().iter().enumerate() {
        let table = |sequence: &'a Sequence| &sequence.tables()[number];
        let of = |(sequence, n): (&'a Sequence, usize)| table(sequence).wanted(sequence.position(), n);
        let mut wanted: usize = appends.clone().map(of).sum();
        if let PageKind::Window(window) = page.kind() {
            // Between passes pages go back behind the windows, so that no more are in use than the windows have and the rows
            // of a pass fill. Those that are shared stay with others.
            let own = |sequence| Table::pages(table(sequence)).filter(|page| !page.is_shared()).count();
            let (spans, own) = appends.clone().fold((0, 0), |(n, sum), (sequence, _)| (n + 1, sum + own(sequence)));
            wanted = wanted.min((PageKind::in_pass(window, spans, rows) as usize).saturating_sub(own));
        }
        pool.check(number, wanted)?;
    }
    Ok(())
}
