package trust

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/slotota/ota"
)

// Limits of records.
const (
	MaxKeys    = 16      // keys of a role
	maxVersion = 1 << 53 // exclusive, of all numbers
)

// Record is what a trust record says.
type Record struct {
	// Version is 1 or more, and goes up by one with every record.
	Version uint64
	// SecurityStep is by how much the security version of a firmware may exceed
	// what the device has committed, at least 1. It keeps a thief of release keys
	// from setting it so high that no honest update is accepted any more.
	SecurityStep uint64
	// SecurityMin is the lowest security version that is accepted, also by a
	// device that has committed nothing yet.
	SecurityMin uint64
	// Expires is when firmware is no longer accepted on account of this record,
	// in whole seconds, or zero. It counts on devices that know the time.
	Expires time.Time
	// Root signs records, Release signs manifests. No key is in both.
	Root, Release Role
}

// Role is a set of keys.
type Role struct {
	Threshold int   // how many different keys must have signed, at least 1
	Keys      []Key // in any order, none twice
}

// Text returns the text of the record, the one form that it has. Errors wrap
// [ErrRecord].
func (r *Record) Text() (string, error) {
	if err := r.check(); err != nil {
		return "", err
	}
	return r.text(), nil
}

func (r *Record) text() string {
	var b strings.Builder
	b.WriteString(recordHeader)
	fmt.Fprintf(&b, "version %d\nstep %d\n", r.Version, r.SecurityStep)
	if r.SecurityMin > 0 {
		fmt.Fprintf(&b, "min %d\n", r.SecurityMin)
	}
	if !r.Expires.IsZero() {
		fmt.Fprintf(&b, "expires %s\n", r.Expires.UTC().Format(time.RFC3339))
	}
	for _, role := range []struct {
		name string
		*Role
	}{{"root", &r.Root}, {"release", &r.Release}} {
		fmt.Fprintf(&b, "%s %d\n", role.name, role.Threshold)
		for _, k := range role.Keys {
			fmt.Fprintf(&b, "key %s\n", k)
		}
	}
	return b.String()
}

// check finds contradictions.
func (r *Record) check() error {
	switch {
	case r.Version < 1 || r.Version >= maxVersion:
		return because(ErrRecord, "version %d", r.Version)
	case r.SecurityStep < 1 || r.SecurityStep >= maxVersion:
		return because(ErrRecord, "a step of %d", r.SecurityStep)
	case r.SecurityMin >= maxVersion:
		return because(ErrRecord, "a lowest security version of %d", r.SecurityMin)
	case r.Expires.Nanosecond() != 0 || !r.Expires.IsZero() && (r.Expires.Year() < 1970 || r.Expires.UTC().Year() > 9999):
		return because(ErrRecord, "the time of expiry is not a whole second of the years 1970 to 9999")
	}
	if err := r.Root.check(); err != nil {
		return because(ErrRecord, "root: %w", err)
	}
	if err := r.Release.check(); err != nil {
		return because(ErrRecord, "release: %w", err)
	}
	for _, k := range r.Release.Keys {
		if slices.ContainsFunc(r.Root.Keys, func(o Key) bool { return o.pub == k.pub }) {
			return because(ErrRecord, "%s is both a root and a release key", k.ID())
		}
	}
	return nil
}

func (r *Role) check() error {
	if len(r.Keys) > MaxKeys {
		return fmt.Errorf("more than %d keys", MaxKeys)
	}
	if r.Threshold < 1 || r.Threshold > len(r.Keys) {
		return fmt.Errorf("a threshold of %d with %d keys", r.Threshold, len(r.Keys))
	}
	for i, k := range r.Keys {
		if k.name == "" {
			return fmt.Errorf("key %d is none", i)
		}
		for _, o := range r.Keys[:i] {
			switch {
			case o.pub == k.pub:
				return fmt.Errorf("%s and %s are the same key", o.ID(), k.ID())
			case o.ID() == k.ID():
				return fmt.Errorf("two keys have the ID %s", k.ID())
			}
		}
	}
	return nil
}

// ParseRecord reads the text of a record, in the one form that Text writes.
// Nothing says who it is by. Errors wrap [ErrFormat], [ErrKey] or [ErrRecord].
func ParseRecord(text string) (*Record, error) {
	if len(text) > MaxNote {
		return nil, because(ErrTooLarge, "a record of %d bytes, at most %d", len(text), MaxNote)
	}
	rest, ok := strings.CutPrefix(text, recordHeader)
	if !ok {
		return nil, because(ErrFormat, "no trust record of version 1")
	}
	p := &parser{rest: rest, line: 1}
	r := &Record{Version: p.number("version"), SecurityStep: p.number("step")}
	if p.at("min") {
		r.SecurityMin = p.number("min")
	}
	if p.at("expires") {
		var err error
		if r.Expires, err = time.Parse(time.RFC3339, p.value("expires")); err != nil {
			p.fail(because(ErrFormat, "not a time of RFC 3339"))
		}
	}
	r.Root, r.Release = p.role("root"), p.role("release")
	if p.rest != "" {
		p.fail(because(ErrFormat, "a line too many"))
	}
	if p.err != nil {
		return nil, p.err
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	if r.text() != text {
		return nil, because(ErrFormat, "a number or time is not in its only form")
	}
	return r, nil
}

// parser reads lines of a word and a value, until the first error.
type parser struct {
	rest string
	line int // the last one read
	err  error
}

func (p *parser) fail(err error) {
	if p.err == nil {
		p.err = fmt.Errorf("line %d: %w", p.line, err)
	}
}

// at says whether the next line begins with that word.
func (p *parser) at(word string) bool { return strings.HasPrefix(p.rest, word+" ") }

func (p *parser) value(word string) string {
	p.line++
	line, rest, ok := strings.Cut(p.rest, "\n")
	v, is := strings.CutPrefix(line, word+" ")
	if !ok || !is {
		p.fail(because(ErrFormat, "%s instead of %q and a value", ota.Quote(line), word))
		return ""
	}
	p.rest = rest
	return v
}

func (p *parser) number(word string) uint64 {
	v, err := strconv.ParseUint(p.value(word), 10, 53)
	if err != nil {
		p.fail(because(ErrFormat, "not a number of 1 to 53 bits"))
	}
	return v
}

func (p *parser) role(name string) (r Role) {
	// What does not fit cannot be a threshold either.
	r.Threshold = int(min(p.number(name), MaxKeys+1))
	for p.err == nil && p.at("key") {
		if len(r.Keys) == MaxKeys {
			p.fail(because(ErrRecord, "%s: more than %d keys", name, MaxKeys))
			break
		}
		k, err := ParseKey(p.value("key"))
		if err != nil {
			p.fail(because(ErrRecord, "%w", err))
		}
		r.Keys = append(r.Keys, k)
	}
	return r
}
