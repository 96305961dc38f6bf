use super::*;

/// An evaluator of its own: right to left with a stack, on the written tokens.
fn evaluate(words: &[String], modulus: i64) -> i64 {
    let mut stack: Vec<i64> = Vec::new();
    for word in words.iter().rev() {
        match word.parse::<i64>() {
            Ok(number) => stack.push(number),
            Err(_) => {
                let (a, b) = (stack.pop().unwrap(), stack.pop().unwrap());
                stack.push(
                    match word.as_str() {
                        "+" => a + b,
                        "-" => a - b,
                        "*" => a * b,
                        other => panic!("{other} is no operator"),
                    }
                    .rem_euclid(modulus),
                );
            }
        }
    }
    assert_eq!(stack.len(), 1, "one value is left of {words:?}");
    stack[0]
}

#[test]
fn expressions_are_what_they_say_and_their_answers_are_right() {
    let length = 6;
    let mut lengths = [0u32; 6];
    for (document, modulus) in (0..3000).zip([23, 5, 2].into_iter().cycle()) {
        let ids = expression(Stream::new(9, "mano/train", &[document]), length, modulus, false);
        assert!(ids.iter().all(|id| (0..mano_vocab(length) as i32).contains(id)));
        let words: Vec<String> = ids.iter().map(|id| mano_token(*id)).collect();
        let (head, expression, tail) = (&words[..2], &words[2..words.len() - 2], &words[words.len() - 2..]);
        let numbers = expression.iter().filter_map(|word| word.parse::<u32>().ok());
        assert!(numbers.into_iter().all(|number| number < modulus));
        let operations = expression.iter().filter(|w| ["+", "-", "*"].contains(&w.as_str())).count();
        assert_eq!(head, ["<bos>".to_owned(), format!("<len_{operations}>")]);
        assert_eq!(expression.len(), 2 * operations + 1);
        assert_eq!(tail, ["<ans>".to_owned(), evaluate(expression, modulus.into()).to_string()]);
        assert_eq!(mano_operations(ids[1].into()), Some(operations as u32));
        lengths[operations - 1] += 1;
    }
    assert!(lengths.iter().all(|n| (400..600).contains(n)), "lengths are uniform: {lengths:?}");
}

#[test]
fn tests_have_the_full_length_and_seeds_differ() {
    let of = |seed, document| expression(Stream::new(seed, "mano/eval", &[document]), 10, 23, true);
    assert!((0..100).all(|document| of(1, document).len() == 2 + 21 + 2));
    assert_ne!(of(1, 0), of(1, 1));
    assert_ne!(of(1, 0), of(2, 0));
}

#[test]
fn the_first_expression_of_seed_0_is_what_it_was() {
    let ids = expression(Stream::new(0, "mano/train", &[0]), 4, 23, false);
    let words: Vec<_> = ids.into_iter().map(mano_token).collect();
    assert_eq!(words.join(" "), "<bos> <len_1> - 17 16 <ans> 1");
}

#[test]
fn the_vocabulary_has_a_word_for_each_id() {
    let words: std::collections::BTreeSet<_> = (0..mano_vocab(24) as i32).map(mano_token).collect();
    assert_eq!(words.len(), 29 + 24);
}
