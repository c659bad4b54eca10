// A tokeniser of mathematical text: two ways to type the same problem give the same tokens.
//
// The text is folded already (rbfast/curation/text.py): lower case, UTF-8, and every non-ASCII character belongs to a
// word. A token is a word, a numeral, a sign, or the name of a LaTeX command. Pure typesetting (\left, \text, dollars,
// Asymptote figures, brackets that group nothing) gives no token, and \frac12 reads as in TeX: frac 1 2. Braces become
// round brackets, except those of a set. rbfast/curation/text_reference.py is the same in Python, and the oracle of the
// tests.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

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

// The token of a command: its name, a canonical name of the same sign, or nothing if it only sets type.
inline std::string_view command_token(std::string_view name) {
  static constexpr std::string_view kTypesetting[] = {
      "left",   "right",  "big",    "bigl",   "bigr",   "bigg",         "displaystyle", "text",
      "textbf", "textit", "mathrm", "mathbf", "mathit", "operatorname", "quad",         "qquad",
      "limits", "ldots",  "cdots",  "dots",   "begin",  "end"};
  if (is_one_of(name, kTypesetting)) return {};
  if (name == "dfrac" || name == "tfrac") return "frac";
  if (name == "leq") return "le";
  if (name == "geq") return "ge";
  if (name == "neq") return "ne";
  if (name == "times" || name == "cdot") return "*";
  if (name == "prime") return "'";
  if (name == "lvert" || name == "rvert" || name == "vert" || name == "mid") return "|";
  if (name == "lbrace") return "{";
  if (name == "rbrace") return "}";
  if (name == "lnot") return "neg";
  return name;
}

// A token: its hash, and its character if it has only one ('F' for the command frac, else 0).
struct Token {
  uint64_t hash;
  char sign;
};

// The signs of braces; their hashes are those of round brackets. kArgument opens the argument of a command, ^ or /;
// kEnd closes; kSet opens a set if it holds a list.
constexpr char kArgument = '\x02', kEnd = '\x03', kSet = '\x04';
constexpr std::string_view kOpening = "(\x02\x04";  // a round bracket or a brace that opens

inline Token token_of(std::string_view token) {
  const char sign = token.size() == 1 ? token[0] : token == "frac" ? 'F' : '\0';
  return {hash_token(token), sign};
}

inline bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

inline bool is_in(char c, std::string_view set) {  // inlined and unrolled, unlike memchr
  for (const char x : set)
    if (x == c) return true;
  return false;
}

// Reads the tokens of one folded text in order, with a ',' for each separator.
class Reader {
 public:
  Reader(std::string_view text, bool mask_digits, std::vector<Token>& out)
      : text_(text), masked_(mask_digits), out_(out) {}

  void read() {
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c == '\\')
        backslash();
      else if (is_word(c))
        word();
      else if (is_digit(c))
        digits(masked_ ? numeral_end() : with_point(run(at_, is_digit)));
      else if (figures_ && starts(kOpen))
        figure();
      else if (c == '{' || c == '}')
        brace(c);
      else if (c == '!' || c == '\'')
        mark(c);
      else
        sign(c);
    }
  }

 private:
  static constexpr std::string_view kOpen = "[asy]", kClose = "[/asy]";

  bool starts(std::string_view prefix, size_t offset = 0) const {
    return at_ + offset < text_.size() && text_.compare(at_ + offset, prefix.size(), prefix) == 0;
  }
  char peek(size_t at) const { return at < text_.size() ? text_[at] : '\0'; }
  size_t run(size_t from, bool (*belongs)(char)) const {
    while (from < text_.size() && belongs(text_[from])) ++from;
    return from;
  }
  void push(std::string_view token) { out_.push_back(token_of(token)); }
  void digits(size_t stop) {
    push(masked_ ? std::string_view("0") : text_.substr(at_, stop - at_));
    at_ = bound_ = stop;
  }
  // Where a numeral ends, including thousands separators (, or {,} or ,\! before three digits) and decimals.
  size_t numeral_end() const {
    size_t stop = run(at_, is_digit);
    for (;;) {
      size_t from = stop;
      if (text_.compare(from, 3, "{,}") == 0 || text_.compare(from, 3, ",\\!") == 0)
        from += 3;
      else if (peek(from) == ',')
        from += 1;
      else
        break;
      const size_t end = run(from, is_digit);
      if (end != from + 3) break;
      stop = end;
    }
    return with_point(stop);
  }
  // Where a number ends with its decimals, given that its whole digits end at `stop`.
  size_t with_point(size_t stop) const {
    const size_t end = peek(stop) == '.' ? run(stop + 1, is_digit) : stop;
    return end > stop + 1 ? end : stop;
  }
  void word() {
    const size_t stop = run(at_, is_word);
    push(text_.substr(at_, stop - at_));
    const bool shortened = at_ > 0 && text_[at_ - 1] == '\'' && bound_ != at_;  // the t of "don't"
    bound_ = stop == at_ + 1 && is_letter(text_[at_]) && !shortened ? stop : kNowhere;
    at_ = stop;
  }
  void figure() {
    const size_t close = text_.find(kClose, at_);
    figures_ = close != std::string_view::npos;
    if (figures_)
      at_ = close + kClose.size();
    else
      sign('[');
  }
  void backslash() {
    const size_t stop = run(at_ + 1, is_letter);
    if (stop == at_ + 1) return escape(peek(at_ + 1));
    const std::string_view name = text_.substr(at_ + 1, stop - at_ - 1), token = command_token(name);
    at_ = stop;
    static constexpr std::string_view kRelations[] = {"in", "notin", "cup", "cap", "setminus", "subset", "subseteq"};
    named_ = stop, relates_ = is_one_of(name, kRelations);
    if (!token.empty()) push(token), taking_ = relates_ ? kNowhere : stop;
    if ((name == "begin" || name == "end") && peek(at_) == '{') {
      const size_t close = run(at_ + 1, [](char x) { return is_letter(x) || x == '*'; });
      if (peek(close) == '}') at_ = close + 1;
    } else if (is_digit(peek(at_))) {
      digits(at_ + 1);
    }
    bound_ = at_;
  }
  // A spacing command, an escaped character, or a line break.
  void escape(char c) {
    if (at_ + 1 < text_.size() && is_in(c, "{}|%")) push(text_.substr(at_ + 1, 1));
    if (at_ + 1 < text_.size() && c == '\\') push(",");
    at_ += at_ + 1 < text_.size() && !is_word(c) ? 2 : 1;
  }
  void brace(char c) {
    const bool is_argument = at_ == taking_ || (at_ > 0 && is_in(text_[at_ - 1], "}^/"));
    const std::string_view same = c == '{' ? "(" : ")";
    out_.push_back({hash_token(same), c == '}' ? kEnd : is_argument ? kArgument : may_be_set() ? kSet : '('});
    ++at_;
  }
  // Whether this brace may open a set: in TeX nothing before it takes it as an argument, and it does not begin a font
  // change: {\bf a, b}.
  bool may_be_set() const {
    size_t before = at_, next = at_ + 1;
    while (before > 0 && is_space(text_[before - 1])) --before;
    while (is_space(peek(next))) ++next;
    if (peek(next) == '\\') return false;
    if (before == named_) return relates_;
    const char last = before > 0 ? text_[before - 1] : '\0';
    return !is_in(last, "_^/}]") && (before < at_ || !(is_word(last) || is_digit(last)));
  }
  // "!" or "'": a factorial or a prime, or punctuation.
  void mark(char c) {
    const bool follows = at_ == bound_ || (at_ > 0 && is_in(text_[at_ - 1], "})]|"));
    const char next = peek(at_ + 1);
    const bool in_word = is_word(next) && !(is_letter(next) && peek(at_ + 2) == '\'');  // in a'b' it is a prime
    const bool counts = c == '!' ? follows || next == '=' : follows && !in_word;
    if (counts) push(text_.substr(at_, 1));
    ++at_;
    bound_ = counts ? at_ : kNowhere;
  }
  void sign(char c) {
    const bool raised = c == '^' && is_raised(peek(at_ + 1) == '{' ? 2 : 1);
    if (is_in(c, ",;&"))
      push(",");
    else if (c == '~' && is_negation())
      push("neg");
    else if (is_in(c, "+-*/=<>()[]|%^") && !raised)
      push(text_.substr(at_, 1));
    ++at_;
  }
  bool is_raised(size_t offset) const { return starts("\\circ", offset) || starts("\\prime", offset); }

  // Whether a tilde negates what follows (~p), and is not TeX's space (5~cm).
  bool is_negation() const {
    const char last = at_ > 0 ? text_[at_ - 1] : ' ', next = peek(at_ + 1);
    return (is_space(last) || is_in(last, "([$~>&|^")) && (is_word(next) || next == '(' || next == '~');
  }

  static constexpr size_t kNowhere = static_cast<size_t>(-1);
  std::string_view text_;
  bool masked_;
  std::vector<Token>& out_;
  size_t at_ = 0, bound_ = kNowhere;  // where a prime or a factorial would attach to the last token
  size_t taking_ = kNowhere;          // where the last command takes its argument
  size_t named_ = kNowhere;           // where the last command's name ended
  bool relates_ = false;              // whether the last command is a relation, which takes no argument
  bool figures_ = true;               // false after an unclosed figure
};

// Replaces each numeral and its sign, fractions too, by "0"; a sign between two terms becomes "+". In place.
inline void whole_numerals(std::vector<Token>& row) {
  static const Token plus = token_of("+"), zero = token_of("0");
  size_t size = 0;
  const auto before = [&](size_t back) { return size >= back ? row[size - back].sign : '\0'; };
  for (size_t i = 0; i < row.size(); ++i) {
    if (row[i].sign == kEnd && before(1) == '0' && before(2) != '\0' && is_in(before(2), kOpening)) {
      row[i] = zero;
      size -= 2;
    }
    while (row[i].sign == '0') {
      if ((before(2) == 'F' && before(1) == '0') || (before(2) == '0' && before(1) == '/')) {
        size -= 2;
      } else if (before(1) != '+' && before(1) != '-') {
        break;
      } else if (const char term = before(2); is_letter(term) || (term != '\0' && is_in(term, "0)]"))) {
        row[size - 1] = plus;
        break;
      } else {
        --size;
      }
    }
    row[size++] = row[i];
  }
  row.resize(size);
}

// An open bracket: where it is, how many tokens were kept before it, whether a sign came before it within the enclosing
// brackets, and whether it holds a list.
struct Opened {
  size_t at, kept;
  bool is_signed, is_list;
};

// Drops separators, and brackets that group nothing or are unmatched. In place.
inline void group(std::vector<Token>& row, std::vector<Opened>& opened) {
  static const uint64_t kOpenSet = hash_token("{"), kCloseSet = hash_token("}");
  constexpr uint64_t kDropped = 0;
  opened.clear();
  size_t kept = 0, inner_from = 0, inner_to = 0;  // the last pair of brackets closed
  bool is_signed = false;
  for (size_t i = 0; i < row.size(); ++i) {
    const char sign = row[i].sign;
    if (sign == ',') {
      row[i].hash = kDropped;
      if (!opened.empty()) opened.back().is_list = true;
    } else if (sign != '\0' && is_in(sign, kOpening)) {
      opened.push_back({i, kept, is_signed, false});
      is_signed = false;
    } else if (sign == ')' || sign == kEnd) {
      if (opened.empty()) {
        row[i].hash = kDropped;
        continue;
      }
      const Opened open = opened.back();
      opened.pop_back();
      if (row[open.at].sign == kSet && sign == kEnd && open.is_list && kept > open.kept + 1) {
        row[open.at].hash = kOpenSet, row[i].hash = kCloseSet;
        kept += 2;
        is_signed = is_signed || open.is_signed;
        inner_from = inner_to = 0;
        continue;
      }
      // Whether a command, ^ or / applies to the group.
      const bool is_taken = row[open.at].sign == kArgument || (open.at > 0 && is_in(row[open.at - 1].sign, "/^")) ||
                            (i + 1 < row.size() && row[i + 1].sign == '^');
      const bool is_double = inner_from == open.at + 1 && inner_to + 1 == i;
      if ((is_signed || (kept > open.kept + 1 && is_taken)) && !is_double)
        kept += 2;
      else
        row[i].hash = row[open.at].hash = kDropped;
      is_signed = is_signed || open.is_signed;
      inner_from = open.at, inner_to = i;
    } else {
      ++kept;
      is_signed = is_signed || (sign != '\0' && is_in(sign, "-+*/=<>^|!"));
    }
  }
  for (const Opened& open : opened) row[open.at].hash = kDropped;
  size_t size = 0;
  for (const Token& token : row)
    if (token.hash != kDropped) row[size++] = token;
  row.resize(size);
}

// Tokenises one text after another, reusing its memory.
class Tokeniser {
 public:
  const std::vector<Token>& operator()(std::string_view text, bool mask_digits) {
    row_.clear();
    Reader(text, mask_digits, row_).read();
    if (mask_digits) whole_numerals(row_);
    group(row_, opened_);
    return row_;
  }

 private:
  std::vector<Token> row_;
  std::vector<Opened> opened_;
};

}  // namespace rbfast
