//! Checks that there are pages for the next tokens of sequences, before any of them changes.

use crate::Sequence;
use crate::cache::{Held, PageKind, PagePool, PagesFull, Table};

/// An error if the pool has too few free pages for these sequences to take this many tokens each, in one step with passes of at most
/// `rows` rows.
pub(crate) fn check<'a>(
    pool: &PagePool,
    appends: impl Iterator<Item = (&'a Sequence, usize)> + Clone,
    rows: usize,
) -> Result<(), PagesFull> {
    for (number, page) in pool.layout().pages().iter().enumerate() {
        let tables = appends.clone().map(|(sequence, n)| (&sequence.tables()[number], sequence.position(), n));
        let mut wanted: usize = tables.clone().map(|(table, position, n)| table.wanted(position, n)).sum();
        if wanted == 0 {
            continue;
        }
        // If all sequences that share a page continue, the last one is its only owner and needs no copy.
        wanted -= Held::alone(tables.clone().flat_map(|(table, position, n)| table.replaced(position, n)));
        if let PageKind::Window(window) = page.kind() {
            // Between passes, the pages before the windows go back to the pool. So no more pages are in use than the windows have
            // and the rows of a pass fill. Shared pages do not come back.
            let spans = tables.clone().count();
            if wanted > spans {
                let there = Held::alone(tables.flat_map(|(table, _, _)| Table::pages(table)));
                wanted = wanted.min((PageKind::in_pass(window, spans, rows) as usize).saturating_sub(there));
            }
        }
        pool.check(number, wanted)?;
    }
    Ok(())
}
