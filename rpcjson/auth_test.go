package rpcjson

import (
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// authVectors are what mos sends to a device that wants a password.
type authVectors struct {
	HTDigest map[Algorithm]string
	Cases    []struct {
		Name, Challenge, Authorization, Auth string
		Algorithm                            Algorithm
		Username                             string
		Used                                 *string `json:"password_used"`
		Realm, Method, URI, NC, HA1, HA2     string
		Response                             string
		Valid                                bool
		Nonce, CNonce                        json.RawMessage
		Exchanges                            []struct{ Request, Response string }
		Frames                               []struct{ Dir, Payload string }
	}
}

// withUsers returns options with an Access for the password lines.
func withUsers(t testing.TB, lines string, change func(*AccessOptions)) func(*Options) {
	t.Helper()
	p, err := ParsePasswords(strings.NewReader(lines), "RPC")
	require.NoError(t, err)
	o := AccessOptions{Passwords: p}
	if change != nil {
		change(&o)
	}
	a, err := NewAccess(o)
	require.NoError(t, err)
	return func(o *Options) { o.NoAuth, o.Authorizer = false, a }
}

// The recorded exchanges, byte by byte except for the nonce and what depends on
// it: the formulas, the challenges, and what becomes of the answers.
func TestAuthVectors(t *testing.T) {
	var v authVectors
	readVectors(t, "auth.json", &v)
	require.Len(t, v.Cases, 9)
	nonceOf := regexp.MustCompile(`nonce(="|\\": )([\w-]+)`)
	for _, c := range v.Cases {
		t.Run(c.Name, func(t *testing.T) {
			s := newTest(t, newFake(), withUsers(t, v.HTDigest[c.Algorithm], nil))
			d := &digest{algorithm: c.Algorithm, user: c.Username, realm: c.Realm, nonce: strings.Trim(string(c.Nonce), `"`),
				uri: c.URI, cnonce: strings.Trim(string(c.CNonce), `"`), nc: c.NC}
			if c.Used != nil {
				require.Equal(t, c.HA1, c.Algorithm.hash(c.Username, c.Realm, *c.Used))
				require.Equal(t, c.HA2, c.Algorithm.hash(c.Method, c.URI))
				require.Equal(t, c.Response, d.answer(c.HA1, c.Method))
				line, err := HashPassword(c.Algorithm, "admin", "RPC", "secret")
				require.NoError(t, err)
				require.Equal(t, v.HTDigest[c.Algorithm], line)
			}
			// fresh puts the nonce of the challenge in place of the recorded one.
			fresh := func(text, got string) string {
				m := nonceOf.FindStringSubmatch(got)
				require.NotNil(t, m, "%s", got)
				old := d.nonce
				d.nonce = m[2]
				defer func() { d.nonce = old }()
				require.NotEqual(t, old, m[2])
				text = strings.ReplaceAll(text, old, m[2])
				return strings.ReplaceAll(text, c.Response, d.answer(c.HA1, c.Method))
			}
			if len(c.Exchanges) > 0 {
				srv := httptest.NewServer(s)
				defer srv.Close()
				var challenge string
				for i, x := range c.Exchanges {
					if i > 0 {
						x.Request = fresh(x.Request, challenge)
						require.Contains(t, x.Request, "Authorization: Digest ")
					}
					res, body := raw(t, srv, x.Request)
					head, want, _ := strings.Cut(x.Response, "\r\n\r\n")
					require.Equal(t, want, body)
					require.True(t, strings.HasPrefix(head, "HTTP/1.1 "+res.Status), "%s", res.Status)
					require.Contains(t, head, fmt.Sprintf("\r\nContent-Length: %s\r\n", res.Header.Get("Content-Length")))
					require.Equal(t, "application/json", res.Header.Get("Content-Type"))
					require.True(t, res.Close)
					if res.StatusCode == 401 {
						challenge = res.Header.Get("WWW-Authenticate")
						require.Len(t, res.Header.Values("WWW-Authenticate"), 1)
						require.Equal(t, nonceOf.ReplaceAllString(c.Challenge, "nonce${1}N"), nonceOf.ReplaceAllString(challenge, "nonce${1}N"))
					}
				}
				return
			}
			var reply string
			for i, f := range c.Frames {
				if f.Dir == "device_to_client" {
					require.Equal(t, nonceOf.ReplaceAllString(f.Payload, "nonce${1}N"), nonceOf.ReplaceAllString(reply, "nonce${1}N"))
					continue
				}
				if i > 0 {
					f.Payload = fresh(f.Payload, reply)
				}
				b, err := s.Call(t.Context(), Peer{Channel: "WS_in", Addr: "127.0.0.1:1"}, []byte(f.Payload))
				require.NoError(t, err)
				reply = string(b)
			}
		})
	}
}
