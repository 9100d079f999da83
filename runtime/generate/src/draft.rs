//! Drafts: proposed next tokens, which one step checks together.
//!
//! Each proposed token is a row of the step. Tokens are sampled as always. As long as the sampled token is the proposed one, the
//! logits after the proposal are those that the next token needs, and the step has computed them already. So proposals never change
//! a text. They save steps, and they pay if several rows read little more from the drive than one.

use std::fmt;

/// Proposes tokens that may come next.
pub trait Draft: Send + fmt::Debug {
    /// Appends the tokens that may follow `context` to `out`, in order. There can be any number; those that do not fit into the
    /// step are ignored.
    fn propose(&mut self, context: &[u32], out: &mut Vec<u32>);
}

/// Searches for the latest tokens earlier in the context, and proposes those that followed them there. This works well if text
/// repeats itself: code that is edited, documents that are summarised, tables. It needs no second model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptLookup {
    /// Most tokens to propose.
    pub most: usize,
    /// How many of the latest tokens to search for at first; fewer, down to `least`, if that many are not found.
    pub longest: usize,
    /// Fewest tokens to search for, at least 1.
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
            // The newest place with at least one token after it.
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
