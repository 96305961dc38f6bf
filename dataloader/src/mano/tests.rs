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
        let document: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        let read = read_mano(&document).unwrap();
        assert_eq!(read.operations, operations as u32);
        assert!(read.moduli >> modulus & 1 == 1, "{words:?} is right modulo {modulus}");
        for other in 2..=MODULUS {
            let fits = words.iter().filter_map(|word| word.parse::<u32>().ok()).all(|number| number < other);
            let right = fits && evaluate(expression, other.into()).to_string() == tail[1];
            assert_eq!(read.moduli >> other & 1 == 1, right, "{words:?} modulo {other}");
        }
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

#[test]
fn what_is_no_document_of_mano_is_told_in_what() {
    let known: std::collections::BTreeMap<String, i64> =
        (0..40).map(|id| (mano_token(id), i64::from(id))).collect();
    let read = |text: &str| {
        let ids: Vec<i64> =
            text.split_whitespace().map(|word| known.get(word).copied().unwrap_or(9000)).collect();
        read_mano(&ids)
    };
    let right = read("<bos> <len_2> - * 5 7 20 <ans> 15").unwrap();
    assert_eq!((right.operations, right.moduli), (2, 0b111 << 21), "by each modulus that knows 20");
    for (text, said) in [
        ("<bos> <len_1> <ans>", "is too short"),
        ("", "is too short"),
        ("<ans> <len_1> + 1 1 <ans> 2", "does not have the form"),
        ("<bos> + + 1 1 <ans> 2", "does not have the form"),
        ("<bos> word + 1 1 <ans> 2", "does not have the form"),
        ("<bos> <len_1> + 1 1 2 2", "does not have the form"),
        ("<bos> <len_1> + 1 1 <ans> +", "ends with no number"),
        ("<bos> <len_1> + 1 word <ans> 2", "has the token 9000"),
        ("<bos> <len_2> + 1 1 <ans> 2", "says that it has 2 operations, and has 1"),
        ("<bos> <len_1> 1 + 1 <ans> 2", "has an operator without operands"),
        ("<bos> <len_1> + 1 1 1 <ans> 2", "has more than one expression"),
        ("<bos> <len_1> + 1 1 <ans> 3", "has a wrong answer"),
    ] {
        let told = read(text).unwrap_err();
        assert!(told.contains(said), "{text}: {told}");
    }
    assert!(
        read_mano(&[1, i64::MAX, 3, 6, 6, 2, 6]).is_err()
            && read_mano(&[1, i64::MIN, 3, 6, 6, 2, 6]).is_err()
    );
}
