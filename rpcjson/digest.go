package rpcjson

import (
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"strings"
)

// Algorithm is a hash function of digest authentication.
type Algorithm string

// The algorithms, as they are called in challenges (RFC 7616, section 6.1).
const (
	MD5    Algorithm = "MD5"
	SHA256 Algorithm = "SHA-256"
)

// algorithms are all there are, in the order of preference.
var algorithms = [...]Algorithm{SHA256, MD5}

func (a Algorithm) new() hash.Hash {
	if a == MD5 {
		return md5.New()
	}
	return sha256.New()
}

// hash returns the hash of the parts with colons between them, in hexadecimal.
func (a Algorithm) hash(parts ...string) string {
	h := a.new()
	for i, p := range parts {
		if i > 0 {
			h.Write([]byte{':'})
		}
		h.Write([]byte(p))
	}
	return hex.EncodeToString(h.Sum(nil))
}

// parseAlgorithm reads the name of an algorithm; none means MD5 (RFC 7616,
// section 3.3).
func parseAlgorithm(name string) (Algorithm, bool) {
	if name == "" {
		return MD5, true
	}
	for _, a := range algorithms {
		if strings.EqualFold(name, string(a)) {
			return a, true
		}
	}
	return "", false
}

// What stands for method and URI in the digest of a frame
// (mongoose-os-libs/rpc-common, src/mg_rpc.c).
const (
	frameMethod = "dummy_method"
	frameURI    = "dummy_uri"
)

// digest is the proof that somebody knows a password: the header Authorization of
// a request (RFC 7616), or the member auth of a frame.
type digest struct {
	algorithm           Algorithm
	user, realm, nonce  string
	uri, cnonce, opaque string
	nc                  string // as it was hashed
	response            string
}

// answer returns the response that proves the password whose hash is ha1.
func (d *digest) answer(ha1, method string) string {
	return d.algorithm.hash(ha1, d.nonce, d.nc, d.cnonce, "auth", d.algorithm.hash(method, d.uri))
}

// proves reports whether d proves the password whose hash is ha1. It takes the
// same time in any case.
func (d *digest) proves(ha1, method string) bool {
	want := d.answer(ha1, method)
	return subtle.ConstantTimeCompare([]byte(want), []byte(strings.ToLower(d.response))) == 1
}

// count returns the value of nc, 0 if it is none.
func (d *digest) count() uint64 {
	var b [4]byte
	if len(d.nc) != 2*len(b) { // Decode does not look how much there is room for
		return 0
	}
	if _, err := hex.Decode(b[:], []byte(d.nc)); err != nil {
		return 0
	}
	return uint64(binary.BigEndian.Uint32(b[:]))
}

// Bounds of what is parsed before anybody is known.
const (
	maxAuthHeader = 4 << 10
	maxAuthParams = 24
)

// errAuthHeader says that a header is not understood.
var errAuthHeader = errors.New("malformed credentials")

// parseAuth splits a challenge or credentials (RFC 9110, section 11.4): the scheme
// in lower case, and the parameters with their names in lower case, or, where
// there are none, what stands in place of them. The error is errAuthHeader.
func parseAuth(s string) (scheme, token string, params map[string]string, err error) {
	if len(s) > maxAuthHeader {
		return "", "", nil, errAuthHeader
	}
	scheme, rest, _ := strings.Cut(strings.Trim(s, " \t"), " ")
	scheme, rest = strings.ToLower(scheme), strings.TrimLeft(rest, " \t")
	if scheme == "" || strings.ContainsFunc(scheme, func(r rune) bool { return !isTokenChar(r) }) {
		return "", "", nil, errAuthHeader
	}
	if scheme != "digest" {
		return scheme, rest, nil, nil
	}
	params = map[string]string{}
	for rest != "" {
		i := strings.IndexFunc(rest, func(r rune) bool { return !isTokenChar(r) })
		if i < 1 {
			return "", "", nil, errAuthHeader
		}
		name := strings.ToLower(rest[:i])
		rest = strings.TrimLeft(rest[i:], " \t")
		if rest == "" || rest[0] != '=' {
			return "", "", nil, errAuthHeader
		}
		var value string
		value, rest, err = authValue(strings.TrimLeft(rest[1:], " \t"))
		if err != nil {
			return "", "", nil, err
		}
		if _, twice := params[name]; twice || len(params) == maxAuthParams {
			return "", "", nil, errAuthHeader
		}
		params[name] = value
		rest = strings.TrimLeft(rest, " \t")
		if rest == "" {
			break
		}
		// Empty elements of a list are nothing (RFC 9110, section 5.6.1).
		trimmed := strings.TrimLeft(rest, ", \t")
		if rest[0] != ',' {
			return "", "", nil, errAuthHeader
		}
		rest = trimmed
	}
	return scheme, "", params, nil
}

// authValue reads a token or a quoted string.
func authValue(s string) (value, rest string, err error) {
	if s == "" || s[0] != '"' {
		i := strings.IndexFunc(s, func(r rune) bool { return !isTokenChar(r) })
		switch {
		case i < 0:
			i = len(s)
			fallthrough
		case i > 0:
			return s[:i], s[i:], nil
		}
		return "", "", errAuthHeader
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			return b.String(), s[i+1:], nil
		case c == '\\':
			if i++; i == len(s) {
				return "", "", errAuthHeader
			}
			b.WriteByte(s[i])
		case c < ' ' && c != '\t', c == 0x7f:
			return "", "", errAuthHeader
		default:
			b.WriteByte(c)
		}
	}
	return "", "", errAuthHeader
}

// isTokenChar reports whether r may be part of a token (RFC 9110, section 5.6.2).
func isTokenChar(r rune) bool {
	return '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' ||
		r < 0x80 && strings.ContainsRune("!#$%&'*+-.^_`|~", r)
}

// quoted returns s as a quoted string of a header.
func quoted(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// headerDigest reads the parameters of the header Authorization.
func headerDigest(params map[string]string) (*digest, error) {
	a, known := parseAlgorithm(params["algorithm"])
	d := &digest{
		algorithm: a, user: params["username"], realm: params["realm"], nonce: params["nonce"],
		uri: params["uri"], cnonce: params["cnonce"], nc: params["nc"], response: params["response"],
	}
	if !known || d.user == "" || d.nonce == "" || d.uri == "" || d.cnonce == "" || d.count() == 0 ||
		params["qop"] != "auth" || len(d.response) != 2*a.new().Size() {
		return nil, errAuthHeader
	}
	return d, nil
}

// header returns the text of the header Authorization, in the order of mos.
func (d *digest) header() string {
	s := fmt.Sprintf(`Digest username=%s, realm=%s, uri=%s, algorithm=%s, nonce=%s, nc=%s, cnonce=%s, qop=auth, response="%s"`,
		quoted(d.user), quoted(d.realm), quoted(d.uri), d.algorithm, quoted(d.nonce), d.nc, quoted(d.cnonce), d.response)
	if d.opaque != "" {
		s += ", opaque=" + quoted(d.opaque)
	}
	return s
}

// frameDigest reads the member auth of a frame. Numbers may be strings, and
// without algorithm it is MD5.
func frameDigest(auth []byte, depth int) (*digest, error) {
	d := &digest{uri: frameURI, nc: "1"}
	var algorithm string
	err := members(auth, depth, func(key []byte, v token) {
		switch string(key) {
		case "realm":
			d.realm = v.text()
		case "username":
			d.user = v.text()
		case "nonce":
			d.nonce = v.text()
		case "cnonce":
			d.cnonce = v.text()
		case "response":
			d.response = v.text()
		case "algorithm":
			algorithm = v.text()
		}
	})
	a, known := parseAlgorithm(algorithm)
	d.algorithm = a
	if err != nil || !known || len(auth) > maxAuthHeader || d.realm == "" || d.user == "" || d.nonce == "" || d.cnonce == "" || d.response == "" {
		return nil, errAuthHeader
	}
	return d, nil
}

// randomNonce returns a number below 1<<32 for use as a cnonce, in decimal.
func randomNonce() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	return fmt.Sprint(binary.BigEndian.Uint32(b[:]))
}
