package rpcjson

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/slotota/ota"
)

// ArgError says what is wrong with an argument. It wraps [ota.ErrInvalid] and is
// answered with code 400.
type ArgError struct {
	Name string // argument, or "" if it is the parameters as a whole
	Want string // what is needed
	Got  string // what came, quoted and cut
}

// Error names the argument, what it should be and what it is.
func (e *ArgError) Error() string {
	s := "need " + e.Want + ", got " + e.Got
	if e.Name != "" {
		return e.Name + ": " + s
	}
	return s
}

// Unwrap returns [ota.ErrInvalid].
func (e *ArgError) Unwrap() error { return ota.ErrInvalid }

// Args are the parameters of a call. Each method looks up one by its exact name
// and reports whether it was given; null counts as not given, and of a name
// that occurs twice the last one counts. The first value of a wrong type sets
// the error that Err returns: read all arguments, then ask Err, then act.
//
// The rules are those of the scan formats of the original (cesanta/mongoose-os,
// src/frozen/frozen.c), except that it ignores wrong types. Not safe for
// concurrent use.
type Args struct {
	tok   token
	depth int
	err   error

	all     []argument // in the order they came
	allErr  error      // what ended them early
	scanned bool
}

// argument is one of Args.
type argument struct {
	name []byte
	val  token
}

// maxRemembered bounds the arguments that are not looked for all over again.
const maxRemembered = 16

// parseParams reads parameters that stand alone: any JSON value, or nothing. As in
// a frame, an object may lack its last brace.
func parseParams(b []byte, depth int) (token, error) {
	s := scanner{b: b, depth: depth}
	c := s.peek()
	if s.i == len(b) {
		return token{}, nil
	}
	start := s.i
	v, err := s.value()
	if err != nil && c == '{' && harmless(err) {
		return token{kindObject, b[start:]}, nil
	}
	return v, err
}

// Raw returns the text of the parameters, a string without its quotes, nil if
// there are none. The bytes belong to the call.
func (a *Args) Raw() []byte { return a.tok.raw }

// Err returns the first error met, an *[ArgError].
func (a *Args) Err() error { return a.err }

func (a *Args) fail(name, want string, got []byte) {
	if a.err == nil {
		a.err = &ArgError{name, want, ota.Quote(string(got[:min(len(got), 128)]))}
	}
}

// find returns the value of the named argument; its kind is kindNone if there is
// none.
func (a *Args) find(name string) token {
	switch a.tok.kind {
	case kindNone, kindNull:
		return token{}
	case kindArray:
		if len(bytes.TrimSpace(a.tok.raw[1:len(a.tok.raw)-1])) == 0 {
			return token{}
		}
		fallthrough
	default:
		a.fail("", "an object of arguments", a.tok.raw)
		return token{}
	case kindObject:
	}
	if !a.scanned {
		// Once only: a chunk of firmware is long.
		a.scanned = true
		a.allErr = members(a.tok.raw, a.depth, func(key []byte, v token) {
			if len(a.all) <= maxRemembered {
				a.all = append(a.all, argument{key, v})
			}
		})
	}
	if !harmless(a.allErr) { // what is missing might be what is looked for
		if a.err == nil {
			a.err = &ArgError{"", "well-formed arguments", "an error at " + a.allErr.Error()}
		}
		return token{}
	}
	var found token // the last one of the name
	if len(a.all) <= maxRemembered {
		for _, g := range a.all {
			if string(g.name) == name {
				found = g.val
			}
		}
		return found
	}
	_ = members(a.tok.raw, a.depth, func(key []byte, v token) {
		if string(key) == name {
			found = v
		}
	})
	return found
}

// Int returns an integer from lo to hi: a number without fraction and exponent,
// or a string of one, in which 0x and 0 in front mean base 16 and 8.
func (a *Args) Int(name string, lo, hi int64) (v int64, given bool) {
	t := a.find(name)
	if t.kind == kindNone || t.kind == kindNull {
		return 0, false
	}
	want := "an integer"
	if t.kind == kindNumber || t.kind == kindString {
		n, err := parseInt(t.text())
		if err == nil && lo <= n && n <= hi {
			return n, true
		}
		if err == nil || errors.Is(err, strconv.ErrRange) {
			want = fmt.Sprintf("an integer from %d to %d", lo, hi)
		}
	}
	a.fail(name, want, t.raw)
	return 0, false
}

// parseInt reads an integer as strtol with base 0 does, but the whole of s.
func parseInt(s string) (int64, error) {
	s = strings.TrimLeft(s, " \t\n\v\f\r")
	digits := strings.TrimLeft(s, "+-")
	sign := s[:len(s)-len(digits)]
	if len(sign) > 1 {
		return 0, strconv.ErrSyntax
	}
	base := 10
	switch {
	case strings.HasPrefix(digits, "0x"), strings.HasPrefix(digits, "0X"):
		base, digits = 16, digits[2:]
	case len(digits) > 1 && digits[0] == '0':
		base = 8
	}
	if strings.HasPrefix(digits, "+") || strings.HasPrefix(digits, "-") {
		return 0, strconv.ErrSyntax
	}
	return strconv.ParseInt(sign+digits, base, 64)
}

// Bool returns true or false; nothing else is taken for one of them.
func (a *Args) Bool(name string) (v, given bool) {
	switch t := a.find(name); t.kind {
	case kindNone, kindNull:
		return false, false
	case kindTrue, kindFalse:
		return t.kind == kindTrue, true
	default:
		a.fail(name, "true or false", t.raw)
		return false, false
	}
}

// String returns a string with its escapes resolved, or the text of a number or
// boolean.
func (a *Args) String(name string) (v string, given bool) {
	switch t := a.find(name); t.kind {
	case kindNone, kindNull:
		return "", false
	case kindObject, kindArray:
		a.fail(name, "a string", t.raw)
		return "", false
	default:
		return t.text(), true
	}
}

// Token returns the text of a value of any type as it stands, null included; of
// a string, what stands between the quotes. The bytes belong to the call.
func (a *Args) Token(name string) (raw []byte, isString, given bool) {
	t := a.find(name)
	return t.raw, t.kind == kindString, t.kind != kindNone
}

// Bytes returns the bytes of a string in base64, standard alphabet with padding.
func (a *Args) Bytes(name string) (v []byte, given bool) {
	return a.decode(name, func(n int) []byte { return make([]byte, 0, n) })
}

// decode is Bytes with the memory that room returns, which is of the given
// capacity, for what is decoded.
func (a *Args) decode(name string, room func(n int) []byte) (v []byte, given bool) {
	t := a.find(name)
	if t.kind == kindNone || t.kind == kindNull {
		return nil, false
	}
	if t.kind == kindString {
		text := bytes.TrimRight(unescape(t.raw), "\r\n")
		if bytes.IndexByte(text, '\n') < 0 && bytes.IndexByte(text, '\r') < 0 {
			v = room(base64.StdEncoding.DecodedLen(len(text)))
			if v, err := base64.StdEncoding.Strict().AppendDecode(v[:0], text); err == nil {
				return v, true
			}
		}
	}
	a.fail(name, "a string in padded base64", t.raw)
	return nil, false
}
