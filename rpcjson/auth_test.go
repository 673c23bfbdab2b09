package rpcjson

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
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

// frameLine is a channel for frames to s.
type frameLine struct {
	s    *Server
	peer Peer
	sent []string
}

func (l *frameLine) Close() error { return nil }
func (l *frameLine) RoundTrip(ctx context.Context, frame []byte, _ int) ([]byte, error) {
	l.sent = append(l.sent, string(frame))
	return l.s.Call(ctx, l.peer, frame)
}

// Our client logs in where it is asked to, with the nonce it knows, and says what
// is wrong where it cannot.
func TestClientLogin(t *testing.T) {
	for _, alg := range algorithms {
		line, err := HashPassword(alg, "admin", "RPC", "secret")
		require.NoError(t, err)
		s := newTest(t, newFake(), withUsers(t, line, nil))
		requests := 0
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			requests++
			s.ServeHTTP(w, r)
		}))
		defer srv.Close()
		c, err := Dial(t.Context(), srv.URL, &ClientOptions{User: "admin", Password: "secret"})
		require.NoError(t, err)
		defer c.Close()
		for range 3 {
			require.NoError(t, c.Call(t.Context(), "OTA.Begin", nil, nil))
		}
		require.Equal(t, 4, requests, "one challenge")
		require.Empty(t, c.ch.(*httpChannel).login.d.user)

		for _, o := range []*ClientOptions{nil, {User: "admin", Password: "wrong"}, {User: "nobody", Password: "secret"}, {Token: "x"}} {
			requests = 0
			c, err := Dial(t.Context(), srv.URL, o)
			require.NoError(t, err)
			defer c.Close()
			err = c.Call(t.Context(), "OTA.Begin", nil, nil)
			require.ErrorIs(t, err, ErrUnauthenticated)
			require.LessOrEqual(t, requests, 2)
		}

		l := &frameLine{s: s, peer: Peer{Channel: "UART"}}
		c = NewClient(l, &ClientOptions{User: "admin", Password: "secret"})
		require.NoError(t, c.Call(t.Context(), "OTA.Commit", nil, nil))
		require.Len(t, l.sent, 2)
		l.sent = nil
		err = c.Call(t.Context(), "OTA.Write", map[string]any{"offset": 1, "data": make([]byte, 3000)}, nil)
		require.ErrorContains(t, err, "Expected offset 0, got 1")
		require.Len(t, l.sent, 2, "a big frame goes once")
		require.Contains(t, l.sent[0], "RPC.Ping")
		c = NewClient(l, &ClientOptions{User: "admin", Password: "wrong"})
		l.sent = nil
		require.ErrorIs(t, c.Call(t.Context(), "OTA.Commit", nil, nil), ErrUnauthenticated)
		require.Len(t, l.sent, 2)
	}
	_, err := Dial(t.Context(), "http://h", &ClientOptions{User: "a", Token: "b"})
	require.ErrorIs(t, err, ota.ErrInvalid)
}

// A redirect, or a challenge of another host, gets nothing.
func TestClientKeepsCredentials(t *testing.T) {
	var seen []string
	evil := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen = append(seen, r.Header.Get("Authorization"))
	}))
	defer evil.Close()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == "" {
			w.Header().Set("WWW-Authenticate", `Digest qop="auth", realm="RPC", nonce="x"`)
			w.WriteHeader(401)
			return
		}
		http.Redirect(w, r, evil.URL, http.StatusTemporaryRedirect)
	}))
	defer srv.Close()
	for _, o := range []*ClientOptions{{User: "admin", Password: "secret"}, {Token: "token"}} {
		c, err := Dial(t.Context(), srv.URL, o)
		require.NoError(t, err)
		defer c.Close()
		err = c.Call(t.Context(), "OTA.Status", nil, nil)
		var e *Error
		require.ErrorAs(t, err, &e)
		require.Equal(t, 307, e.Code)
		require.NotContains(t, err.Error(), "secret")
	}
	require.Empty(t, seen)
}

// Errors of a device are told by their meaning, whether it gives a reason or not.
func TestErrorIs(t *testing.T) {
	d := newFake()
	c := NewClient(&frameLine{s: newTest(t, d, nil)}, nil)
	for op, want := range map[string]error{"revert": ota.ErrCommitted, "commit": ota.ErrCommitted, "snapshot": ota.ErrNotCommitted, "setbootstate": ota.ErrUnverifiedSlot} {
		d.errs[op] = &ota.Error{Op: "x", Slot: 1, Off: -1, Err: want}
		method := map[string]string{"revert": "OTA.Revert", "commit": "OTA.Commit", "snapshot": "OTA.CreateSnapshot", "setbootstate": "OTA.SetBootState"}[op]
		err := c.Call(t.Context(), method, map[string]int{"active_slot": 1}, nil)
		require.ErrorIs(t, err, want)
		require.NotErrorIs(t, err, ota.ErrBusy)
	}
	require.NoError(t, c.Call(t.Context(), "OTA.Begin", map[string]int{"size": 5}, nil))
	require.ErrorIs(t, c.Call(t.Context(), "OTA.Begin", nil, nil), ota.ErrBusy)
	require.ErrorIs(t, c.Call(t.Context(), "OTA.Update", map[string]string{"url": "https://h/"}, nil), ota.ErrBusy)
	for text, want := range map[string]error{
		"Update is already in progress": ota.ErrBusy, "Failed to init updater": ota.ErrBusy,
		"Previous update has not been committed yet": ota.ErrNotCommitted,
		"Signature verification failed":              ota.ErrUnverified, "-12 Invalid checksum": ota.ErrDigest,
	} {
		require.ErrorIs(t, &Error{Code: -1, Message: text}, want)
		require.NotErrorIs(t, &Error{Code: -1, Message: text, Reason: "x"}, want, "the reason counts")
		require.NotErrorIs(t, &Error{Code: -1, Message: text}, ota.ErrRollback)
	}
	require.ErrorIs(t, &Error{Code: 418}, ota.ErrRebootPending)
	require.ErrorIs(t, &Error{Code: 403}, ErrForbidden)
}
