package rpcjson

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/slotota/ota"
	"github.com/slotota/ota/internal/strictjson"
)

// Limits of an access list.
const (
	maxACL     = 64 << 10 // bytes
	maxRules   = 256
	maxPattern = 256 // bytes
)

// ACL is an access list: who may call which method, over what. It is not changed
// after it was read, and may be used concurrently.
type ACL struct{ rules []rule }

type rule struct {
	method, channel string // "" = any
	users           []userRule
	everybody       bool // without being known; if not, users decides
}

type userRule struct {
	pattern string
	allow   bool
}

// ParseACL reads an access list as Mongoose OS has it in rpc.acl (without the form
// @file) and in the file of rpc.acl_file:
//
//	[{"method": "OTA.*", "ch_type": "HTTP", "acl": "admin,+op?,-*"},
//	 {"method": "*", "acl": "*"}]
//
// The first entry decides whose method and ch_type (see [Peer]) match; one of them
// may be missing. If there is none the call is refused. acl is * or +* for everybody,
// without any credentials, -* for nobody, or else a list of patterns of user
// names with + or - before them, of which the first that matches decides; + may
// be left out, and if none matches the call is refused. In patterns, ? stands for
// any character, * for any number of characters except slashes, ** also for
// slashes, and | separates alternatives; case does not matter, and a $ at the
// end nothing.
//
// Entries that Mongoose OS would skip are errors, as are members of other names.
// The error wraps [ota.ErrInvalid].
func ParseACL(b []byte) (*ACL, error) {
	a, err := parseACL(b)
	if err != nil {
		return nil, fmt.Errorf("rpcjson: access list: %w: %w", err, ota.ErrInvalid)
	}
	return a, nil
}

func parseACL(b []byte) (*ACL, error) {
	if len(b) > maxACL {
		return nil, fmt.Errorf("%d bytes, at most %d", len(b), maxACL)
	}
	if err := strictjson.Check(b); err != nil {
		return nil, err
	}
	var entries []json.RawMessage
	if json.Unmarshal(b, &entries) != nil || entries == nil {
		return nil, errors.New("need an array")
	}
	if len(entries) > maxRules {
		return nil, fmt.Errorf("%d entries, at most %d", len(entries), maxRules)
	}
	a := &ACL{rules: make([]rule, len(entries))}
	for i, e := range entries {
		r, err := parseRule(e)
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
		a.rules[i] = r
	}
	return a, nil
}

func parseRule(b []byte) (r rule, err error) {
	m, err := strictjson.Members(b)
	if err != nil {
		return r, errors.New("need an object")
	}
	var acl *string
	for _, m := range m {
		s, err := strictjson.String(m.Value)
		if err != nil || len(s) > maxPattern && m.Name != "acl" {
			return r, fmt.Errorf("%s: need a string of at most %d bytes", ota.Quote(m.Name), maxPattern)
		}
		switch m.Name {
		case "method":
			r.method = s
		case "ch_type":
			r.channel = s
		case "acl":
			acl = &s
		default:
			return r, fmt.Errorf("%s: no such member", ota.Quote(m.Name))
		}
	}
	switch {
	case acl == nil:
		return r, errors.New("acl is missing")
	case r.method == "" && r.channel == "":
		return r, errors.New("need method or ch_type")
	case *acl == "*" || *acl == "+*":
		r.everybody = true
		return r, nil
	case *acl == "-*":
		return r, nil
	}
	for p := range strings.SplitSeq(*acl, ",") {
		if p == "" {
			continue
		}
		u := userRule{strings.TrimLeft(p[:1], "+-") + p[1:], p[0] != '-'}
		if len(u.pattern) > maxPattern {
			return r, fmt.Errorf("acl: pattern of more than %d bytes", maxPattern)
		}
		r.users = append(r.users, u)
	}
	return r, nil
}

// rule returns the entry that decides about a call, nil if there is none.
func (a *ACL) rule(channel, method string) *rule {
	for i := range a.rules {
		r := &a.rules[i]
		if (r.channel == "" || r.channel == channel) && (r.method == "" || match(r.method, method)) {
			return r
		}
	}
	return nil
}

// nobody reports whether no user may.
func (r *rule) nobody() bool { return r == nil || !r.everybody && len(r.users) == 0 }

func (r *rule) allows(user string) bool {
	for _, u := range r.users {
		if match(u.pattern, user) {
			return u.allow
		}
	}
	return r.everybody
}

// match reports whether the whole of s matches one of the alternatives of
// pattern. It takes time in proportion to the product of their lengths.
func match(pattern, s string) bool {
	for p := range strings.SplitSeq(pattern, "|") {
		if matchOne(strings.TrimSuffix(p, "$"), s) {
			return true
		}
	}
	return false
}

func matchOne(p, s string) bool {
	in := []rune(s)
	// ok[j]: what came of the pattern so far matches in[:j].
	ok := make([]bool, len(in)+1)
	ok[0] = true
	for p != "" {
		r, n := utf8.DecodeRuneInString(p)
		p = p[n:]
		if r == '*' {
			deep := strings.HasPrefix(p, "*")
			p = strings.TrimPrefix(p, "*")
			for j := 1; j < len(ok); j++ {
				ok[j] = ok[j] || ok[j-1] && (deep || in[j-1] != '/')
			}
			continue
		}
		for j := len(in); j > 0; j-- {
			ok[j] = ok[j-1] && (r == '?' || strings.EqualFold(string(r), string(in[j-1])))
		}
		ok[0] = false
	}
	return ok[len(in)]
}
