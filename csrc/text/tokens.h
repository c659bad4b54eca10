// Words and hashes of mathematical text, so that two typings of one problem give the same tokens.
//
// The text comes folded (rbfast/text.py): lower case, in UTF-8, and every character beyond ASCII belongs to a word. A token
// is a word, a run of digits, one of + - * / = < >, or the name of a LaTeX command. What only sets type (\left, \text,
// dollars, braces, Asymptote figures) gives no token, and \frac12 reads as TeX does: frac 1 2. rbfast/text_reference.py
// says the same in Python and is the oracle of the tests.
#pragma once

#include <cstdint>
#include <string_view>

namespace rbfast {

// The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
inline uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// FNV-1a, 64 bits (Fowler, Noll and Vo).
inline uint64_t hash_token(std::string_view token) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (const char c : token) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
  return hash;
}

inline bool is_letter(char c) { return c >= 'a' && c <= 'z'; }
inline bool is_digit(char c) { return c >= '0' && c <= '9'; }
inline bool is_word(char c) { return is_letter(c) || static_cast<unsigned char>(c) >= 0x80; }

template <size_t N>
bool is_one_of(std::string_view name, const std::string_view (&names)[N]) {
  for (const auto& other : names)
    if (name == other) return true;
  return false;
}

// What a command is called by: itself, another name for the same sign, or nothing where it only sets type.
inline std::string_view command_token(std::string_view name) {
  static constexpr std::string_view kTypesetting[] = {
      "left",   "right",  "big",          "bigl",  "bigr", "bigg",   "displaystyle", "text",  "textbf", "textit", "mathrm",
      "mathbf", "mathit", "operatorname", "quad",  "qquad", "limits", "ldots",        "cdots", "dots",   "begin",  "end"};
  if (is_one_of(name, kTypesetting)) return {};
  if (name == "dfrac" || name == "tfrac") return "frac";
  if (name == "leq") return "le";
  if (name == "geq") return "ge";
  if (name == "neq") return "ne";
  if (name == "times" || name == "cdot") return "*";
  return name;
}

// Calls f(token) for every token of a folded text.
template <typename F>
void each_token(std::string_view text, bool mask_digits, const F& f) {
  constexpr std::string_view kOpen = "[asy]", kClose = "[/asy]", kOperators = "+-*/=<>";
  bool figures = true;  // until one is not closed
  size_t at = 0;
  const size_t end = text.size();
  const auto run = [&](size_t from, bool (*belongs)(char)) {
    while (from < end && belongs(text[from])) ++from;
    return from;
  };
  const auto digits = [&](size_t stop) {
    f(mask_digits ? std::string_view("0") : text.substr(at, stop - at));
    at = stop;
  };
  while (at < end) {
    const char c = text[at];
    if (c == '\\') {
      const size_t stop = run(at + 1, is_letter);
      if (stop == at + 1) {  // a spacing or an escaped mark
        at += at + 1 < end && !is_word(text[at + 1]) ? 2 : 1;
        continue;
      }
      const std::string_view name = text.substr(at + 1, stop - at - 1), token = command_token(name);
      at = stop;
      if (!token.empty()) f(token);
      if ((name == "begin" || name == "end") && at < end && text[at] == '{') {
        const size_t close = run(at + 1, [](char x) { return is_letter(x) || x == '*'; });
        if (close < end && text[close] == '}') at = close + 1;
      } else if (at < end && is_digit(text[at])) {
        digits(at + 1);
      }
    } else if (is_word(c)) {
      const size_t stop = run(at, is_word);
      f(text.substr(at, stop - at));
      at = stop;
    } else if (is_digit(c)) {
      digits(run(at, is_digit));
    } else if (figures && c == '[' && text.substr(at, kOpen.size()) == kOpen) {
      const size_t close = text.find(kClose, at);
      figures = close != std::string_view::npos;
      at = figures ? close + kClose.size() : at + 1;
    } else {
      if (kOperators.find(c) != std::string_view::npos) f(text.substr(at, 1));
      ++at;
    }
  }
}

}  // namespace rbfast
