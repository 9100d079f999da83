//! Lists of token ids on the command line.

use std::str::FromStr;

use crate::error::CliError;

/// Token ids, separated by commas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TokenIds(pub(crate) Vec<u32>);

impl FromStr for TokenIds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let one = |id: &str| {
            let id = id.trim();
            id.parse().map_err(|_| format!("`{id}` is not a token id: write ids as 1,2,3"))
        };
        text.split(',').map(one).collect::<Result<_, _>>().map(TokenIds)
    }
}

/// Refuses ids that the model does not have.
pub(crate) fn check_ids(ids: &[u32], vocab_size: usize) -> Result<(), CliError> {
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(id) => Err(CliError::Usage(format!(
            "token id {id} is outside the model's vocabulary: its ids are 0 to {}",
            vocab_size.saturating_sub(1)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        assert_eq!("1".parse(), Ok(TokenIds(vec![1])));
        assert_eq!("0, 42,7".parse(), Ok(TokenIds(vec![0, 42, 7])));
        for bad in ["", "1,", "1,,2", "-1", "1 2", "4294967296", "x"] {
            assert!(bad.parse::<TokenIds>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ids_outside_the_vocabulary() {
        assert!(check_ids(&[0, 9], 10).is_ok());
        assert_eq!(check_ids(&[0, 10], 10).unwrap_err().exit_code(), 2);
    }
}
