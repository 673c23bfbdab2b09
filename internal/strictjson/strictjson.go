// Package strictjson reads JSON that several parsers must understand alike.
//
// It accepts RFC 8259 restricted as in RFC 7493 (I-JSON) and a little more:
// UTF-8 only, no unpaired surrogates, no object with two member names that are
// equal or differ in case only, bounded depth, nothing after the value.
// encoding/json alone accepts all of that and picks one meaning silently.
package strictjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/slotota/ota"
)

// Limits of what is accepted.
const (
	MaxDepth   = 16   // nested arrays and objects
	MaxMembers = 4096 // members of all objects together
)

// Error says what is wrong with a JSON text, and where.
type Error struct {
	Off int64 // byte offset inside the text
	Msg string
}

// Error formats e on one line.
func (e *Error) Error() string { return fmt.Sprintf("JSON at byte %d: %s", e.Off, e.Msg) }

// Check reports the first thing that makes b no strict JSON text as an
// [*Error]. It takes time and memory in proportion to len(b).
func Check(b []byte) error {
	for i := 0; i < len(b); {
		r, n := utf8.DecodeRune(b[i:])
		if r == utf8.RuneError && n == 1 {
			return &Error{int64(i), "not UTF-8"}
		}
		i += n
	}
	if err := depth(b); err != nil {
		return err
	}
	var raw json.RawMessage
	if err := json.Unmarshal(b, &raw); err != nil {
		e := &Error{int64(len(b)), err.Error()}
		var s *json.SyntaxError
		if errors.As(err, &s) {
			e.Off = s.Offset
		}
		return e
	}
	if i := surrogate(b); i >= 0 {
		return &Error{int64(i), "unpaired surrogate"}
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	n := 0
	return walk(d, &n)
}

// depth bounds the nesting before anything recursive sees the text.
func depth(b []byte) error {
	n, quoted := 0, false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			if n++; n > MaxDepth {
				return &Error{int64(i), "nested too deeply"}
			}
		case c == '}' || c == ']':
			n--
		}
	}
	return nil
}

// surrogate returns where b, a valid JSON text, has an escaped surrogate that
// is not half of a pair, or -1. A backslash occurs only inside of strings.
func surrogate(b []byte) int {
	unit := func(i int) rune {
		if i+6 > len(b) || b[i] != '\\' || b[i+1] != 'u' {
			return 0
		}
		v, _ := strconv.ParseUint(string(b[i+2:i+6]), 16, 16)
		return rune(v)
	}
	for i := 0; i < len(b); i++ {
		if b[i] != '\\' {
			continue
		}
		switch u := unit(i); {
		case u < 0xd800 || u > 0xdfff:
			i++
		case u < 0xdc00 && unit(i+6) >= 0xdc00 && unit(i+6) <= 0xdfff:
			i += 11
		default:
			return i
		}
	}
	return -1
}

// walk reads one value of a valid JSON text and adds its members to n.
func walk(d *json.Decoder, n *int) error {
	t, err := d.Token()
	if err != nil {
		return &Error{d.InputOffset(), err.Error()}
	}
	open, ok := t.(json.Delim)
	if !ok {
		return nil
	}
	seen := map[string]string{}
	for d.More() {
		if open == '{' {
			k, err := d.Token()
			if err != nil {
				return &Error{d.InputOffset(), err.Error()}
			}
			name, _ := k.(string)
			if old, dup := seen[Fold(name)]; dup {
				msg := "duplicate member " + ota.Quote(name)
				if old != name {
					msg = "member " + ota.Quote(name) + " differs from " + ota.Quote(old) + " in case only"
				}
				return &Error{d.InputOffset(), msg}
			}
			if *n++; *n > MaxMembers {
				return &Error{d.InputOffset(), "too many members"}
			}
			seen[Fold(name)] = name
		}
		if err := walk(d, n); err != nil {
			return err
		}
	}
	if _, err := d.Token(); err != nil {
		return &Error{d.InputOffset(), err.Error()}
	}
	return nil
}

// Fold maps all strings that [strings.EqualFold] calls equal to one.
func Fold(s string) string {
	return strings.Map(func(r rune) rune {
		low := r
		for f := unicode.SimpleFold(r); f != r; f = unicode.SimpleFold(f) {
			low = min(low, f)
		}
		return low
	}, s)
}

// Member is a member of an object.
type Member struct {
	Name  string
	Value json.RawMessage
}

// Members returns the members of the object b in their order. b must have
// passed [Check] or be part of a text that did.
func Members(b []byte) ([]Member, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("not an object")
	}
	var ms []Member
	for d.More() {
		k, err := d.Token()
		if err != nil {
			return nil, err
		}
		var m Member
		m.Name, _ = k.(string)
		if err := d.Decode(&m.Value); err != nil {
			return nil, err
		}
		ms = append(ms, m)
	}
	return ms, nil
}

// String returns the value of the JSON string b.
func String(b []byte) (string, error) {
	var s string
	if len(b) == 0 || b[0] != '"' || json.Unmarshal(b, &s) != nil {
		return "", errors.New("not a string")
	}
	return s, nil
}

// Uint returns the value of the JSON number b, which must be written as an
// integer of 0 to max, without fraction or exponent.
func Uint(b []byte, max uint64) (uint64, error) {
	v, err := strconv.ParseUint(string(b), 10, 64)
	switch {
	case err != nil && !errors.Is(err, strconv.ErrRange):
		return 0, errors.New("not an unsigned integer")
	case err != nil || v > max:
		return 0, fmt.Errorf("above %d", max)
	}
	return v, nil
}

// Bool returns the value of the JSON boolean b.
func Bool(b []byte) (bool, error) {
	switch string(b) {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, errors.New("neither true nor false")
}
