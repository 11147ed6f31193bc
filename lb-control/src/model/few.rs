//! Sets of which there are many, and which have one element as a rule.

use std::collections::BTreeSet;
use std::iter::{Chain, Flatten};
use std::{option, slice, vec};

/// Up to so many elements a search from the front is as fast as any.
const FEW: usize = 8;

/// A set that takes no more memory than its elements while they are few: the smallest `BTreeSet`
/// has room for eleven. Elements come in their order.
#[derive(Clone, Debug)]
pub struct Few<T>(Kept<T>);

#[derive(Clone, Debug)]
enum Kept<T> {
    /// In order, each once.
    Few(Vec<T>),
    Many(BTreeSet<T>),
}

impl<T> Default for Few<T> {
    fn default() -> Self {
        Self(Kept::Few(Vec::new()))
    }
}

impl<T: Ord> Few<T> {
    /// Adds an element; says whether it is new.
    pub fn insert(&mut self, element: T) -> bool {
        let few = match &mut self.0 {
            Kept::Many(many) => return many.insert(element),
            Kept::Few(few) => few,
        };
        let Err(place) = few.binary_search(&element) else { return false };
        if few.len() < FEW {
            few.reserve_exact(1);
            few.insert(place, element);
        } else {
            self.0 = Kept::Many(std::mem::take(few).into_iter().chain([element]).collect());
        }
        true
    }

    /// Takes an element out; says whether it was there.
    pub fn remove(&mut self, element: &T) -> bool {
        match &mut self.0 {
            Kept::Many(many) => many.remove(element),
            Kept::Few(few) => few.binary_search(element).map(|place| few.remove(place)).is_ok(),
        }
    }

    /// Whether an element is there.
    pub fn contains(&self, element: &T) -> bool {
        match &self.0 {
            Kept::Many(many) => many.contains(element),
            Kept::Few(few) => few.binary_search(element).is_ok(),
        }
    }
}

impl<T> Few<T> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.0 {
            Kept::Many(many) => many.len(),
            Kept::Few(few) => few.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of them, in order.
    pub fn iter(&self) -> <&Self as IntoIterator>::IntoIter {
        self.into_iter()
    }
}

impl<T: PartialEq> PartialEq for Few<T> {
    /// However they are kept: one that was larger once stays a tree.
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl<T: Eq> Eq for Few<T> {}

impl<T: Ord> FromIterator<T> for Few<T> {
    fn from_iter<I: IntoIterator<Item = T>>(elements: I) -> Self {
        let mut few = Self::default();
        for element in elements {
            few.insert(element);
        }
        few
    }
}

impl<T: Ord, const N: usize> From<[T; N]> for Few<T> {
    fn from(elements: [T; N]) -> Self {
        elements.into_iter().collect()
    }
}

impl<T> IntoIterator for Few<T> {
    type Item = T;
    type IntoIter = Chain<vec::IntoIter<T>, Flatten<option::IntoIter<BTreeSet<T>>>>;

    fn into_iter(self) -> Self::IntoIter {
        let (few, many) = match self.0 {
            Kept::Many(many) => (Vec::new(), Some(many)),
            Kept::Few(few) => (few, None),
        };
        few.into_iter().chain(many.into_iter().flatten())
    }
}

impl<'a, T> IntoIterator for &'a Few<T> {
    type Item = &'a T;
    type IntoIter = Chain<slice::Iter<'a, T>, Flatten<option::IntoIter<&'a BTreeSet<T>>>>;

    fn into_iter(self) -> Self::IntoIter {
        let (few, many) = match &self.0 {
            Kept::Many(many) => (&[][..], Some(many)),
            Kept::Few(few) => (few.as_slice(), None),
        };
        few.iter().chain(many.into_iter().flatten())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set(steps in proptest::collection::vec((any::<bool>(), 0..24_u8), 0..80)) {
            let (mut few, mut set) = (Few::default(), BTreeSet::new());
            for (comes, element) in steps {
                if comes {
                    prop_assert_eq!(few.insert(element), set.insert(element));
                } else {
                    prop_assert_eq!(few.remove(&element), set.remove(&element));
                }
                prop_assert_eq!(few.contains(&element), comes);
                prop_assert!(few.iter().eq(&set));
                prop_assert!(few == set.iter().copied().collect());
                prop_assert_eq!((few.len(), few.is_empty()), (set.len(), set.is_empty()));
            }
        }
    }
}
