package rpcjson

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// kind is the type of a JSON value.
type kind uint8

const (
	kindNone kind = iota // no value at all
	kindString
	kindNumber
	kindTrue
	kindFalse
	kindNull
	kindObject
	kindArray
)

// token is a JSON value as it stands in the text.
type token struct {
	kind kind
	raw  []byte // text; of a string, what stands between the quotes
}

// text returns the value of a string, or the text of another value; nothing for
// null.
func (t token) text() string {
	switch t.kind {
	case kindNull, kindNone:
		return ""
	case kindString:
		return string(unescape(t.raw))
	}
	return string(t.raw)
}

var errTooDeep = errors.New("nested too deeply")

// syntaxError says where a text stops being JSON.
type syntaxError struct {
	off  int
	want string
	// unclosed says that the text ends after a complete member of an object,
	// so that nothing but closing braces is known to be missing.
	unclosed bool
}

func (e *syntaxError) Error() string {
	return fmt.Sprintf("byte %d: need %s", e.off, e.want)
}

// harmless reports whether err, of members, leaves no doubt about what the members
// are: there is none, or the text just ends after one of them. The original takes
// all that stands before an error, whatever comes after it.
func harmless(err error) bool {
	e, ok := err.(*syntaxError) // not one inside of a memberError
	return err == nil || ok && e.unclosed
}

// scanner reads JSON the way the devices do (cesanta/mongoose-os,
// src/frozen/frozen.c): commas may be missing or too many, keys need no quotes,
// numbers may be hexadecimal. It never goes back, so that it takes linear time.
type scanner struct {
	b     []byte
	i     int
	depth int // how many more levels may be opened
}

// members calls f for each complete member of the object that b begins with,
// with the offset of its value. It returns an error for whatever ends the object
// early; the members before it have been handed out. What follows the object is
// ignored.
func members(b []byte, depth int, f func(key []byte, v token)) error {
	s := scanner{b: b, depth: depth}
	return s.object(f, nil)
}

// memberError reports that the value of a member is damaged, in contrast to a
// text that ends or breaks between two members.
type memberError struct {
	key []byte
	err error
}

func (e *memberError) Error() string { return e.err.Error() }
func (e *memberError) Unwrap() error { return e.err }

func (s *scanner) fail(want string) error { return &syntaxError{off: s.i, want: want} }

// peek skips blanks and returns the next byte, 0 at the end.
func (s *scanner) peek() byte {
	for s.i < len(s.b) {
		switch c := s.b[s.i]; c {
		case ' ', '\t', '\r', '\n':
			s.i++
		default:
			return c
		}
	}
	return 0
}

// object reads an object and calls f for each of its members, and inner for the
// members of those that are objects themselves, before f. Both may be nil.
func (s *scanner) object(f, inner func(key []byte, v token)) error {
	if s.peek() != '{' {
		return s.fail("an object")
	}
	if s.depth == 0 {
		return errTooDeep
	}
	s.depth--
	s.i++
	complete := false // a member, and no comma announces another
	for {
		c := s.peek()
		switch {
		case c == '}':
			s.i++
			s.depth++
			return nil
		case s.i == len(s.b) && complete:
			return &syntaxError{s.i, "a member name", true}
		}
		key, err := s.key(c)
		if err != nil {
			return err
		}
		if s.peek() != ':' {
			return s.fail("a colon")
		}
		s.i++
		v, err := s.valueOf(inner)
		if err != nil {
			return &memberError{key, err}
		}
		if f != nil {
			f(key, v)
		}
		complete = s.peek() != ','
		if !complete {
			s.i++
		}
	}
}

func (s *scanner) key(c byte) ([]byte, error) {
	if c == '"' {
		return s.str()
	}
	if !isLetter(c) {
		return nil, s.fail("a member name")
	}
	start := s.i
	for s.i < len(s.b) && (isLetter(s.b[s.i]) || isDigit(s.b[s.i])) {
		s.i++
	}
	return s.b[start:s.i], nil
}

func (s *scanner) value() (token, error) { return s.valueOf(nil) }

// valueOf reads a value and calls f for its members if it is an object.
func (s *scanner) valueOf(f func(key []byte, v token)) (token, error) {
	c := s.peek()
	start := s.i
	k := kindNone
	var err error
	switch {
	case c == '"':
		raw, err := s.str()
		return token{kindString, raw}, err
	case c == '{':
		k, err = kindObject, s.object(f, nil)
	case c == '[':
		k, err = kindArray, s.array()
	case c == 't':
		k, err = kindTrue, s.word("true")
	case c == 'f':
		k, err = kindFalse, s.word("false")
	case c == 'n':
		k, err = kindNull, s.word("null")
	case c == '-' || isDigit(c):
		k, err = kindNumber, s.number()
	default:
		err = s.fail("a value")
	}
	if err != nil {
		return token{}, err
	}
	return token{k, s.b[start:s.i]}, nil
}

func (s *scanner) array() error {
	if s.depth == 0 {
		return errTooDeep
	}
	s.depth--
	s.i++
	for s.peek() != ']' {
		if _, err := s.value(); err != nil {
			return err
		}
		if s.peek() == ',' {
			s.i++
		}
	}
	s.i++
	s.depth++
	return nil
}

func (s *scanner) word(w string) error {
	if len(s.b)-s.i < len(w) || string(s.b[s.i:s.i+len(w)]) != w {
		return s.fail(w)
	}
	s.i += len(w)
	return nil
}

func (s *scanner) number() error {
	if s.b[s.i] == '-' {
		s.i++
	}
	if len(s.b)-s.i > 1 && s.b[s.i] == '0' && s.b[s.i+1] == 'x' {
		s.i += 2
		return s.digits(isHex)
	}
	if err := s.digits(isDigit); err != nil {
		return err
	}
	if s.i < len(s.b) && s.b[s.i] == '.' {
		s.i++
		if err := s.digits(isDigit); err != nil {
			return err
		}
	}
	if s.i < len(s.b) && (s.b[s.i] == 'e' || s.b[s.i] == 'E') {
		s.i++
		if s.i < len(s.b) && (s.b[s.i] == '+' || s.b[s.i] == '-') {
			s.i++
		}
		return s.digits(isDigit)
	}
	return nil
}

func (s *scanner) digits(is func(byte) bool) error {
	start := s.i
	for s.i < len(s.b) && is(s.b[s.i]) {
		s.i++
	}
	if s.i == start {
		return s.fail("a digit")
	}
	return nil
}

// str reads a string and returns what stands between its quotes.
func (s *scanner) str() ([]byte, error) {
	s.i++
	start := s.i
	for s.i += plain(s.b[s.i:]); s.i < len(s.b); s.i += plain(s.b[s.i:]) {
		switch c := s.b[s.i]; {
		case c == '"':
			s.i++
			return s.b[start : s.i-1], nil
		case c == '\\':
			n := escapeLen(s.b[s.i:])
			if n == 0 {
				return nil, s.fail("an escape sequence")
			}
			s.i += n
		case c < ' ':
			return nil, s.fail("a string without control characters")
		default:
			s.i++
		}
	}
	return nil, s.fail("a closing quote")
}

// plain returns how many bytes at the start of b certainly need no look: none of
// them ends a string, begins an escape or is a control character. It looks at
// many at a time, since most of what comes are long strings of base64.
func plain(b []byte) int {
	word := func(i int) uint64 { return special(binary.LittleEndian.Uint64(b[i:])) }
	n := 0
	for len(b)-n >= 32 && (word(n)|word(n+8)|word(n+16)|word(n+24))&0x8080808080808080 == 0 {
		n += 32
	}
	for len(b)-n >= 8 && word(n)&0x8080808080808080 == 0 {
		n += 8
	}
	return n
}

// special returns a word without the highest bit of any byte if none of the eight
// bytes of x is a quote, a backslash or a control character, nor beyond ASCII.
func special(x uint64) uint64 {
	const ones = 0x0101010101010101
	return x | ((x ^ '"'*ones) - ones) | ((x ^ '\\'*ones) - ones) | (x - ' '*ones)
}

// escapeLen returns the length of the escape sequence that b begins with, 0 if
// it is none.
func escapeLen(b []byte) int {
	if len(b) < 2 {
		return 0
	}
	switch b[1] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return 2
	case 'u':
		if len(b) >= 6 && isHex(b[2]) && isHex(b[3]) && isHex(b[4]) && isHex(b[5]) {
			return 6
		}
	}
	return 0
}

// unescape resolves the escape sequences of a scanned string. Without any it
// returns b itself.
func unescape(b []byte) []byte {
	i := bytes.IndexByte(b, '\\')
	if i < 0 {
		return b
	}
	out := append(make([]byte, 0, len(b)), b[:i]...)
	for i < len(b) {
		if b[i] != '\\' {
			out = append(out, b[i])
			i++
			continue
		}
		if b[i+1] != 'u' {
			c := b[i+1]
			switch c {
			case 'b':
				c = '\b'
			case 'f':
				c = '\f'
			case 'n':
				c = '\n'
			case 'r':
				c = '\r'
			case 't':
				c = '\t'
			}
			out = append(out, c)
			i += 2
			continue
		}
		r := hexRune(b[i:])
		i += 6
		if utf16.IsSurrogate(r) {
			var low rune
			if len(b)-i >= 6 && b[i] == '\\' && b[i+1] == 'u' {
				low = hexRune(b[i:])
			}
			// A lone half becomes U+FFFD and consumes nothing else.
			if r = utf16.DecodeRune(r, low); r != utf8.RuneError {
				i += 6
			}
		}
		out = utf8.AppendRune(out, r)
	}
	return out
}

// hexRune returns the value of the \uXXXX that b begins with.
func hexRune(b []byte) rune {
	v, _ := strconv.ParseUint(string(b[2:6]), 16, 16)
	return rune(v)
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func isHex(c byte) bool {
	return isDigit(c) || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

func isLetter(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '_'
}

// appendString appends s as a JSON string of ASCII characters: serial lines take
// no others.
func appendString(dst []byte, s string) []byte {
	dst = append(dst, '"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			dst = append(dst, '\\', byte(r))
		case r == '\n':
			dst = append(dst, '\\', 'n')
		case r == '\r':
			dst = append(dst, '\\', 'r')
		case r == '\t':
			dst = append(dst, '\\', 't')
		case r >= ' ' && r < 0x7f:
			dst = append(dst, byte(r))
		default:
			dst = appendRune(dst, r)
		}
	}
	return append(dst, '"')
}

func appendRune(dst []byte, r rune) []byte {
	const hex = "0123456789abcdef"
	if r > 0xffff {
		hi, lo := utf16.EncodeRune(r)
		return appendRune(appendRune(dst, hi), lo)
	}
	return append(dst, '\\', 'u', hex[r>>12&15], hex[r>>8&15], hex[r>>4&15], hex[r&15])
}

// appendASCII appends the JSON text b with everything that is not ASCII escaped;
// in JSON that occurs in strings only.
func appendASCII(dst, b []byte) []byte {
	for len(b) > 0 {
		n := ascii(b)
		dst = append(dst, b[:n]...)
		if b = b[n:]; len(b) > 0 {
			r, n := utf8.DecodeRune(b)
			dst = appendRune(dst, r)
			b = b[n:]
		}
	}
	return dst
}

// ascii returns how many bytes at the start of b are ASCII.
func ascii(b []byte) int {
	n := 0
	for len(b)-n >= 8 && binary.LittleEndian.Uint64(b[n:])&0x8080808080808080 == 0 {
		n += 8
	}
	for n < len(b) && b[n] < utf8.RuneSelf {
		n++
	}
	return n
}
