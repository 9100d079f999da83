//! Drafts: proposed next tokens, which one step checks together.
//!
//! A row of the step stands behind each proposed token. A token that sampling chooses is taken as it always is; as long as it is the
//! one that was proposed, the logits behind the proposal are the next ones, and the sequence has them already. So proposals never
//! change a text. They save steps, where what is read from the drive for several rows is not much more than for one.

use std::fmt;

/// Proposes what may come next.
pub trait Draft: Send + fmt::Debug {
    /// Appends tokens that may follow `context`, the likeliest continuation first to last, to `out`. As many as it likes: what there
    /// is no room for is not looked at.
    fn propose(&mut self, context: &[u32], out: &mut Vec<u32>);
}

/// Proposes what followed the last time that the latest tokens stood in the context: good where text repeats itself, such as code that
/// is changed, documents that are summarised, or tables. Costs no model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptLookup {
    /// Most tokens to propose.
    pub most: usize,
    /// Latest tokens that must have stood there, at most; fewer, down to `least`, where so many have not.
    pub longest: usize,
    /// Fewest of them, at least 1.
    pub least: usize,
}

impl Default for PromptLookup {
    fn default() -> Self {
        PromptLookup { most: 4, longest: 4, least: 2 }
    }
}

impl Draft for PromptLookup {
    fn propose(&mut self, context: &[u32], out: &mut Vec<u32>) {
        for length in (self.least.max(1)..=self.longest).rev() {
            let Some((before, latest)) = context.len().checked_sub(length).map(|at| context.split_at(at)) else {
                continue;
            };
            // The newest place, with at least one token behind it.
            let found = (0..before.len()).rev().find(|&at| context[at..].starts_with(latest));
            if let Some(at) = found {
                out.extend(context[at + length..].iter().take(self.most));
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn propose(lookup: PromptLookup, context: &[u32]) -> Vec<u32> {
        let mut lookup = lookup;
        let mut out = Vec::new();
        lookup.propose(context, &mut out);
        out
    }

    #[test]
    fn what_followed_last_time_is_proposed() {
        let lookup = PromptLookup { most: 3, longest: 3, least: 2 };
        assert_eq!(propose(lookup, &[1, 2, 3, 4, 5, 6, 7, 2, 3, 4]), [5, 6, 7]);
        assert_eq!(
            propose(lookup, &[9, 3, 4, 8, 1, 3, 4, 6, 5, 3, 4]),
            [6, 5, 3],
            "the newest of two places, by two tokens"
        );
        assert_eq!(propose(lookup, &[5, 5, 5, 5]), [5], "a place may overlap the latest tokens");
        assert!(propose(lookup, &[1, 2, 3, 9, 4, 3]).is_empty(), "one token is not enough");
        for short in [&[][..], &[1], &[1, 1], &[1, 2]] {
            assert!(propose(lookup, short).is_empty());
        }
        assert_eq!(propose(PromptLookup { most: 1, longest: 1, least: 0 }, &[7, 8, 7]), [8]);
    }
}
