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
        let Some((last, before)) = context.split_last() else { return };
        // How many tokens at most agree with the latest ones, and the place behind the newest that do. One search finds them, since all of
        // them end with the last token: contexts are long, and this is done for every token.
        let (mut agree, mut behind) = (0, 0);
        for (end, _) in before.iter().enumerate().rev().filter(|(_, token)| *token == last) {
            let pairs = context[..=end].iter().rev().zip(context.iter().rev());
            let found = pairs.take(self.longest).take_while(|(earlier, latest)| earlier == latest).count();
            if found > agree {
                (agree, behind) = (found, end + 1);
                if found == self.longest {
                    break;
                }
            }
        }
        if agree >= self.least.max(1) {
            out.extend(context[behind..].iter().take(self.most));
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

    /// As it is described: for each number of tokens a search of its own.
    fn described(lookup: PromptLookup, context: &[u32]) -> Vec<u32> {
        for length in (lookup.least.max(1)..=lookup.longest).rev() {
            let Some((before, latest)) = context.len().checked_sub(length).map(|at| context.split_at(at)) else {
                continue;
            };
            if let Some(at) = (0..before.len()).rev().find(|&at| context[at..].starts_with(latest)) {
                return context[at + length..].iter().take(lookup.most).copied().collect();
            }
        }
        Vec::new()
    }

    proptest::proptest! {
        #[test]
        fn one_search_finds_what_many_would(
            context in proptest::collection::vec(0u32..3, 0..40),
            (most, longest, least) in (0usize..6, 0usize..6, 0usize..4),
        ) {
            let lookup = PromptLookup { most, longest, least };
            proptest::prop_assert_eq!(propose(lookup, &context), described(lookup, &context));
        }
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
