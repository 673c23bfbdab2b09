package rpcjson

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

func hashLine(t testing.TB, a Algorithm, user, password string) string {
	t.Helper()
	l, err := HashPassword(a, user, "RPC", password)
	require.NoError(t, err)
	return l + "\n"
}

func TestParsePasswords(t *testing.T) {
	md5, sha := strings.Repeat("aB", 16), strings.Repeat("0f", 32)
	p, err := ParsePasswords(strings.NewReader("# users\r\n\nadmin:RPC:"+md5+"\r\nadmin:RPC:"+sha+"\nop:RPC:"+sha+"\nop:other:"+md5+"\nJosé:RPC:"+md5), "RPC")
	require.NoError(t, err)
	require.Equal(t, map[string]map[Algorithm]string{
		"admin": {MD5: strings.ToLower(md5), SHA256: sha}, "op": {SHA256: sha}, "José": {MD5: strings.ToLower(md5)},
	}, p.users)
	require.Equal(t, []Algorithm{SHA256, MD5}, p.offered(), "neither is known of all")
	delete(p.users, "José")
	require.Equal(t, []Algorithm{SHA256}, p.offered(), "known of all")
	for text, want := range map[string]string{
		"x":                                      "line 1: need user:realm:hash",
		"a:RPC:" + md5 + "\nb:RPC":               "line 2: need user:realm:hash",
		"a:b:c:" + md5:                           "line 1: need user:realm:hash",
		":RPC:" + md5:                            "line 1: user: need",
		"a::" + md5:                              "line 1: realm: need",
		"a\x00:RPC:" + md5:                       "line 1: user: need",
		"\xff:RPC:" + md5:                        "line 1: user: need",
		strings.Repeat("a", 129) + ":RPC:" + md5: "line 1: user: need",
		"a:RPC:" + md5[1:]:                       "line 1: hash: need 32 or 64",
		"a:RPC:" + md5 + " ":                     "line 1: hash: need 32 or 64",
		"a:RPC:z" + md5[1:]:                      "line 1: hash: need hexadecimal",
		"a:RPC:" + md5 + "\na:RPC:" + strings.Repeat("1", 32): "line 2: a second one",
		"a:RPC:" + md5 + strings.Repeat("x", 2000):            "line 1: longer than 1024 bytes",
		strings.Repeat("# comment\n", 110_000):                "the file is larger than 1048576 bytes",
	} {
		_, err := ParsePasswords(strings.NewReader(text), "RPC")
		require.ErrorIs(t, err, ota.ErrInvalid)
		require.ErrorContains(t, err, want)
		require.NotContains(t, err.Error(), md5[2:])
	}
	var b strings.Builder
	for i := range maxUsers + 1 {
		fmt.Fprintf(&b, "user%d:RPC:%s\n", i, md5)
	}
	_, err = ParsePasswords(strings.NewReader(b.String()), "RPC")
	require.ErrorContains(t, err, "line 1001: more than 1000 users")
	_, err = ParsePasswords(iotest.ErrReader(io.ErrClosedPipe), "RPC")
	require.ErrorIs(t, err, io.ErrClosedPipe)
	for _, bad := range [][3]string{{"a:b", "RPC", "p"}, {"", "RPC", "p"}, {"a", "R:C", "p"}} {
		_, err = HashPassword(MD5, bad[0], bad[1], bad[2])
		require.ErrorIs(t, err, ota.ErrInvalid)
	}
	_, err = HashPassword("SHA-1", "a", "RPC", "p")
	require.ErrorIs(t, err, ota.ErrInvalid)
}

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{"", "", true}, {"", "a", false}, {"*", "", true}, {"*", "OTA.Update", true}, {"OTA.*", "ota.Update", true},
		{"OTA.*", "OTA.", true}, {"OTA.*", "Sys.Reboot", false}, {"OTA.Commit", "OTA.CommitX", false}, {"OTA.Commit$", "OTA.Commit", true},
		{"op?", "op1", true}, {"op?", "op", false}, {"op?", "op12", false}, {"a|b", "b", true}, {"a|ab", "ab", true}, {"a|b", "c", false},
		{"*", "a/b", false}, {"**", "a/b", true}, {"a*b*c", "a1b2c", true}, {"a*b*c", "a1c2b", false}, {"*a*", "bab", true},
		{"jos?", "José", true}, {"JOSÉ", "josé", true},
		{strings.Repeat("*a", 60), strings.Repeat("a", 59), false}, {strings.Repeat("*a", 60), strings.Repeat("a", 60), true},
	} {
		require.Equal(t, c.want, match(c.pattern, c.s), "%q %q", c.pattern, c.s)
	}
}

func TestACL(t *testing.T) {
	acl, err := ParseACL([]byte(`[
		{"method":"OTA.*","ch_type":"HTTP","acl":"admin,+op?,-*"},
		{"method":"Sys.Reboot","acl":"-admin,*"},
		{"method":"RPC.List","acl":"-*"},
		{"method":"RPC.Describe","acl":""},
		{"ch_type":"UART","acl":"*"},
		{"method":"RPC.Ping","acl":"+*"}]`))
	require.NoError(t, err)
	for _, c := range []struct {
		channel, method  string
		nobody, everyone bool
		users            string // of admin, op1, x
	}{
		{"HTTP", "OTA.Update", false, false, "admin op1"},
		{"UART", "OTA.Update", false, true, "admin op1 x"},
		{"MQTT", "OTA.Update", true, false, ""},
		{"HTTP", "Sys.Reboot", false, false, "op1 x"},
		{"UART", "Sys.Reboot", false, false, "op1 x"},
		{"HTTP", "RPC.List", true, false, ""},
		{"HTTP", "RPC.Describe", true, false, ""},
		{"HTTP", "RPC.Ping", false, true, "admin op1 x"},
		{"http", "OTA.Update", true, false, ""},
	} {
		r := acl.rule(c.channel, c.method)
		require.Equal(t, c.nobody, r.nobody(), "%+v", c)
		if r == nil {
			continue
		}
		require.Equal(t, c.everyone, r.everybody, "%+v", c)
		var users []string
		for _, u := range []string{"admin", "op1", "x"} {
			if r.allows(u) {
				users = append(users, u)
			}
		}
		require.Equal(t, c.users, strings.Join(users, " "), "%+v", c)
	}
	for text, want := range map[string]string{
		``: "JSON", `{}`: "need an array", `null`: "need an array", `"x"`: "need an array", `[1]`: "entry 0: need an object", `[[]]`: "need an object",
		`[{"method":"*"}]`: "acl is missing", `[{"acl":"*"}]`: "need method or ch_type", `[{"method":"","acl":"*"}]`: "need method or ch_type",
		`[{"method":"*","acl":"*","acl":"-*"}]`: "JSON", `[{"method":"*","ACL":"*"}]`: `"ACL": no such member`, `[{"method":"*","acl":1}]`: "need a string",
		`[{"method":"*","acl":"*"}`: "JSON", `[{"method":"*","acl":"*"}] x`: "JSON",
		`[{"method":"` + strings.Repeat("x", 257) + `","acl":"*"}]`:                          "at most 256 bytes",
		`[{"method":"*","acl":"a,` + strings.Repeat("x", 257) + `"}]`:                        "more than 256 bytes",
		`[` + strings.Repeat(`{"method":"*","acl":"*"},`, 256) + `{"method":"*","acl":"*"}]`: "257 entries",
		strings.Repeat(" ", maxACL+1):                                                        "bytes, at most",
	} {
		_, err := ParseACL([]byte(text))
		require.ErrorIs(t, err, ota.ErrInvalid, text)
		require.ErrorContains(t, err, want, text)
	}
	empty, err := ParseACL([]byte(`[]`))
	require.NoError(t, err)
	require.True(t, empty.rule("HTTP", "RPC.Ping").nobody())
}

func TestNewAccessRefuses(t *testing.T) {
	acl, err := ParseACL([]byte(`[]`))
	require.NoError(t, err)
	for want, o := range map[string]AccessOptions{
		"nobody can ever be authorized": {},
		"ACL excludes Rights":           {ACL: acl, AllowAnonymous: []Right{Read}},
		"token 0: no user":              {Tokens: []Token{{Hash: HashToken("x")}}},
		"token 0: empty":                {Tokens: []Token{{User: "x", Hash: HashToken("")}}},
		"token 1: empty":                {Tokens: []Token{{User: "x", Hash: HashToken("x")}, {User: "y"}}},
		"without name":                  {Rights: map[string][]Right{"": {Read}}},
		`user "a": right unknown (9)`:   {Rights: map[string][]Right{"a": {9}}},
	} {
		_, err := NewAccess(o)
		require.ErrorIs(t, err, ota.ErrInvalid)
		require.ErrorContains(t, err, want)
	}
	require.Len(t, NewToken(), 43)
	require.NotEqual(t, NewToken(), NewToken())
	_, err = MutualTLS(tls.Certificate{}, nil)
	require.ErrorIs(t, err, ota.ErrInvalid)
}

// httpAsk is a request over HTTP as Access sees it.
func httpAsk(addr, authorization string) *Peer {
	r := &http.Request{Method: "POST", RequestURI: "/rpc", URL: &url.URL{Path: "/rpc"}, Header: http.Header{}, RemoteAddr: addr}
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	return httpPeer(r)
}

func TestTokens(t *testing.T) {
	a, err := NewAccess(AccessOptions{Tokens: []Token{{"ci", HashToken("token1")}, {"admin", HashToken("token2")}}})
	require.NoError(t, err)
	ask := func(p *Peer) error { return a.Authorize(t.Context(), p, "OTA.Update", Install) }
	for _, addr := range []string{"127.0.0.1:5", "[::1]:5", "@", "[::ffff:127.0.0.1]:1"} {
		p := httpAsk(addr, "Bearer token2")
		require.NoError(t, ask(p), addr)
		require.Equal(t, "admin", p.User)
	}
	p := httpAsk("192.168.1.1:5", "bearer token1")
	require.ErrorIs(t, ask(p), ErrUnauthenticated, "everybody could have read it")
	p.Request.TLS = &tls.ConnectionState{}
	require.NoError(t, ask(p))
	require.Equal(t, "ci", p.User)
	for _, h := range []string{"", "Bearer", "Bearer ", "Bearer token", "Bearer token11", "Bearer token1 token1", "token1", "Basic token1", "Digest token1", "Bearer token1,"} {
		err := ask(httpAsk("127.0.0.1:5", h))
		require.ErrorIs(t, err, ErrUnauthenticated, h)
		require.Equal(t, `Bearer realm="RPC"`, deny(err).challenges)
		require.NotContains(t, err.Error(), "token1")
	}
	p = httpAsk("127.0.0.1:5", "Bearer token1")
	p.Request.Header.Add("Authorization", "Bearer token1")
	require.ErrorIs(t, ask(p), ErrUnauthenticated, "which one?")
	a.o.AllowPlainTokens = true
	require.NoError(t, ask(httpAsk("192.168.1.1:5", "Bearer token1")))
}

func TestCertificates(t *testing.T) {
	a, err := NewAccess(AccessOptions{CertUser: CommonName})
	require.NoError(t, err)
	cert := &x509.Certificate{Subject: pkix.Name{CommonName: "ci"}, NotAfter: time.Now().Add(time.Hour)}
	state := func(chains ...[]*x509.Certificate) *tls.ConnectionState {
		return &tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}, VerifiedChains: chains}
	}
	ask := func(s *tls.ConnectionState) (string, error) {
		p := &Peer{Channel: "TCP", TLS: s}
		err := a.Authorize(t.Context(), p, "OTA.Update", Install)
		return p.User, err
	}
	user, err := ask(state([]*x509.Certificate{cert}))
	require.NoError(t, err)
	require.Equal(t, "ci", user)
	_, err = ask(state())
	require.ErrorIs(t, err, ErrUnauthenticated, "not verified")
	_, err = ask(nil)
	require.ErrorIs(t, err, ErrUnauthenticated)
	cert.NotAfter = time.Now().Add(-time.Second)
	_, err = ask(state([]*x509.Certificate{cert}))
	require.ErrorIs(t, err, ErrUnauthenticated, "expired since")
	cert.NotAfter, cert.Subject.CommonName = time.Now().Add(time.Hour), ""
	_, err = ask(state([]*x509.Certificate{cert}))
	require.ErrorIs(t, err, ErrUnauthenticated, "nobody's")
}

// A nonce holds for one peer, for a while, and for each count once.
func TestNonces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNonces()
		time.Sleep(10 * time.Hour)
		for _, kind := range []struct {
			life  time.Duration
			issue func(string) string
			check func(string, string) (time.Duration, bool)
		}{
			{headerNonceLife, n.header, n.checkHeader},
			{frameNonceLife, func(p string) string { return fmt.Sprint(n.frame(p)) }, n.checkFrame},
		} {
			seen := map[string]bool{}
			for range 1000 {
				s := kind.issue("p")
				require.False(t, seen[s])
				seen[s] = true
			}
			s := kind.issue("p")
			issued, ok := kind.check(s, "p")
			require.True(t, ok)
			require.InDelta(t, time.Since(n.start), issued, float64(time.Second))
			_, ok = kind.check(s, "q")
			require.False(t, ok, "another peer")
			for i := range s {
				b := []byte(s)
				b[i] ^= 1
				_, ok = kind.check(string(b), "p")
				require.False(t, ok, "%s", b)
			}
			for _, bad := range []string{"", "0", "1", s + "0", "0" + s, s[1:], "-1", "+" + s, "99999999999999999999", strings.Repeat("x", 5000)} {
				_, ok = kind.check(bad, "p")
				require.False(t, ok, bad)
			}
			time.Sleep(kind.life - 2*time.Second)
			_, ok = kind.check(s, "p")
			require.True(t, ok, "just in time")
			// Also not when the bits of the time come round.
			for range 600 {
				time.Sleep(4 * time.Second)
				if _, ok = kind.check(s, "p"); ok {
					require.Fail(t, "valid again")
				}
			}
		}
		_, ok := newNonces().checkHeader(n.header("p"), "p")
		require.False(t, ok, "after a restart")

		v := n.frame("p")
		require.True(t, v>>52 == 1, "an integer of 53 bits")

		require.True(t, n.spend("a", 1, 5))
		require.False(t, n.spend("a", 1, 5))
		require.True(t, n.spend("a", 1, 4), "overtaken")
		require.False(t, n.spend("a", 1, 4))
		require.True(t, n.spend("a", 1, 100))
		require.True(t, n.spend("a", 1, 37))
		require.False(t, n.spend("a", 1, 37))
		require.False(t, n.spend("a", 1, 36), "too far back")
		for i := range 3 * maxUsedNonces {
			require.True(t, n.spend(fmt.Sprint(i), time.Duration(i+2), 1))
			require.LessOrEqual(t, len(n.used), maxUsedNonces)
		}
		require.False(t, n.spend("a", 1, 200), "forgotten is not unused")
		require.False(t, n.spend("0", 2, 1))
		require.False(t, n.spend(fmt.Sprint(3*maxUsedNonces-1), 3*maxUsedNonces+1, 1))
	})
}

// Limits are per peer, for all together, and in a table that does not grow.
func TestLimiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(&Limits{Requests: Rate{1, 3}, TotalRequests: Rate{10, 20}, Logins: Rate{0.1, 2}, TotalLogins: Rate{1, 5}, Peers: 4})
		for range 2 {
			require.Nil(t, l.take("a", true))
		}
		require.ErrorContains(t, l.take("a", true), "too many failed logins")
		require.Nil(t, l.take("a", false), "asking is not trying")
		require.ErrorContains(t, l.take("a", false), "too many requests")
		require.NotNil(t, l.blocked("a"))
		require.Nil(t, l.blocked("b"))
		require.Nil(t, l.take("b", true))
		l.give("b", 2, true, true)
		for range 2 {
			require.Nil(t, l.take("c", true))
		}
		require.Nil(t, l.take("d", true))
		require.ErrorContains(t, l.take("d", true), "failed logins", "all together")
		require.Nil(t, l.take("b", true), "is known")
		time.Sleep(10 * time.Second)
		require.Nil(t, l.take("a", true))
		require.ErrorContains(t, l.take("a", true), "failed logins")
		for i := range 1000 {
			_ = l.take(fmt.Sprint("x", i), false)
		}
		require.Len(t, l.peers, 4)
		require.NotNil(t, l.take("y", false), "shared with the others")
		require.Nil(t, l.take("b", false))
		time.Sleep(2 * time.Hour)
		require.Nil(t, l.take("y", false))
		require.Len(t, l.peers, 1)
	})
	for addr, want := range map[string]string{
		"1.2.3.4:5": "1.2.3.4", "[2001:db8::1]:5": "2001:db8::/64", "[2001:db8::2%eth0]:9": "2001:db8::/64", "[::ffff:1.2.3.4]:1": "1.2.3.4",
		"@": "@", "": "", "UART0": "UART0", strings.Repeat("x", 100): strings.Repeat("x", 64),
	} {
		require.Equal(t, want, addrKey(addr))
	}
	require.NotEqual(t, (&Peer{Channel: "HTTP"}).key(), (&Peer{Channel: "UART"}).key())
}

// Guessing is refused long before it succeeds, over HTTP and in frames; the
// right password then has to wait, too, but nobody else has to.
func TestGuessing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), withUsers(t, hashLine(t, SHA256, "admin", "secret"), nil))
		dial := func(addr, password string) *Client {
			return NewClient(&frameLine{s: s, peer: Peer{Channel: "UDP_in", Addr: addr}}, &ClientOptions{User: "admin", Password: password})
		}
		count := map[int]int{}
		for i := range 100 {
			err := dial("10.0.0.1:99", fmt.Sprint(i)).Call(t.Context(), "OTA.Status", nil, nil)
			var e *Error
			require.ErrorAs(t, err, &e)
			count[e.Code]++
		}
		require.Equal(t, map[int]int{401: 10, 429: 90}, count)
		require.ErrorContains(t, dial("10.0.0.1:5", "secret").Call(t.Context(), "OTA.Status", nil, nil), "too many failed logins")
		require.NoError(t, dial("10.0.0.2:5", "secret").Call(t.Context(), "OTA.Status", nil, nil))
		time.Sleep(10 * time.Second)
		require.NoError(t, dial("10.0.0.1:5", "secret").Call(t.Context(), "OTA.Status", nil, nil))
		for range 2000 { // right ones are not limited
			require.NoError(t, dial("10.0.0.1:5", "secret").Call(t.Context(), "OTA.Status", nil, nil))
		}

		for range 5000 {
			_, err := s.Call(t.Context(), Peer{Channel: "UDP_in", Addr: "10.0.0.3:5"}, []byte(`{"id":1,"method":"OTA.Status"}`))
			require.NoError(t, err)
		}
		b, err := s.Call(t.Context(), Peer{Channel: "UDP_in", Addr: "10.0.0.3:5"}, []byte(`{"id":1,"method":"Nope"}`))
		require.NoError(t, err)
		require.Contains(t, string(b), `"error":{"code":429,"message":"too many requests without authorization"}`)
		w := try(s, "POST", "/rpc", good, func(r *http.Request) { r.RemoteAddr = "10.0.0.4:1" })
		require.Equal(t, 401, w.Code, "another peer")
	})
}

// Guesses that come all at once are no more than those in a row.
func TestGuessingAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int32
		s := newTest(t, newFake(), func(o *Options) {
			o.NoAuth, o.MaxPending = false, 1000
			o.Authorizer = AuthorizerFunc(func(context.Context, *Peer, string, Right) error {
				asked.Add(1)
				time.Sleep(time.Millisecond)
				return ErrUnauthenticated
			})
		})
		codes := make(chan string, 500)
		for range cap(codes) {
			go func() {
				b, err := s.Call(t.Context(), Peer{Channel: "UDP_in", Addr: "10.0.0.1:1"}, []byte(`{"id":1,"method":"OTA.Status","auth":{"x":1}}`))
				require.NoError(t, err)
				codes <- string(b[strings.Index(string(b), `"code"`)+7:][:3])
			}()
		}
		count := map[string]int{}
		for range cap(codes) {
			count[<-codes]++
		}
		require.Equal(t, map[string]int{"401": 10, "429": 490}, count)
		require.EqualValues(t, 10, asked.Load())
	})
}

// A channel that stays open shows once who it belongs to.
func TestAdmit(t *testing.T) {
	s := newTest(t, newFake(), withUsers(t, hashLine(t, MD5, "admin", "secret"), func(o *AccessOptions) {
		o.Tokens = []Token{{"ci", HashToken("token")}}
		o.Rights = map[string][]Right{"ci": {Read}, "admin": {Read, Operate}}
	}))
	status := func(p Peer, method, auth string) string {
		b, err := s.Call(t.Context(), p, []byte(`{"id":1,"method":"`+method+`"`+auth+`}`))
		require.NoError(t, err)
		return string(b)
	}
	open := func(header string, change func(*http.Request)) (Peer, error) {
		p := httpAsk("127.0.0.1:1", header)
		p.Channel = "WS_in"
		p.Request.Host = "127.0.0.1"
		if change != nil {
			change(p.Request)
		}
		err := s.Admit(t.Context(), p)
		return *p, err
	}
	p, err := open("Bearer token", nil)
	require.NoError(t, err)
	for range 3 {
		require.Contains(t, status(p, "OTA.Status", ""), `"result"`)
		require.Contains(t, status(p, "OTA.Commit", ""), `"code":403`)
	}
	p, err = open("", nil)
	require.NoError(t, err)
	require.Contains(t, status(p, "OTA.Status", ""), `auth_type`)

	_, err = open("Bearer wrong", nil)
	require.ErrorIs(t, err, ErrUnauthenticated)
	w := httptest.NewRecorder()
	s.Refuse(w, err)
	require.Equal(t, 401, w.Code)
	require.Len(t, w.Header().Values("WWW-Authenticate"), 2)
	l := headerLogin{user: "admin", password: "secret"}
	require.True(t, l.challenged(w.Header()))
	p, err = open(l.header("POST", "/rpc"), nil)
	require.NoError(t, err)
	for range 3 { // the header is not looked at again
		require.Contains(t, status(p, "OTA.Commit", ""), `"result"`)
	}
	require.Contains(t, status(p, "OTA.Commit", `,"auth":{"realm":"RPC","username":"x","nonce":1,"cnonce":1,"response":"x"}`), `"code":401`, "a frame may say otherwise")

	_, err = open("", func(r *http.Request) { r.Host = "evil.example" })
	require.ErrorIs(t, err, ErrForbidden)
	_, err = open("", func(r *http.Request) { r.Header.Set("Origin", "http://evil.example") })
	require.ErrorIs(t, err, ErrForbidden)
	tcp := Peer{Channel: "TCP", Addr: "127.0.0.1:1", User: "ci"}
	require.NoError(t, s.Admit(t.Context(), &tcp))
	require.Contains(t, status(tcp, "OTA.Status", ""), `"result"`, "as the transport says")
	require.NoError(t, s.Close())
	require.ErrorIs(t, s.Admit(t.Context(), &tcp), ErrClosed)
}

// It takes the same time whether a user exists, within what can be measured here:
// the same hashes are computed.
func TestUnknownUser(t *testing.T) {
	p, err := ParsePasswords(strings.NewReader(hashLine(t, SHA256, "admin", "secret")), "RPC")
	require.NoError(t, err)
	a, err := NewAccess(AccessOptions{Passwords: p})
	require.NoError(t, err)
	for _, user := range []string{"admin", "nobody", "RPC", ""} {
		peer := &Peer{Channel: "UART"}
		d := digest{algorithm: SHA256, user: user, realm: "RPC", nonce: fmt.Sprint(a.nonces.frame(peer.key())), uri: frameURI, cnonce: "1", nc: "1"}
		d.response = d.answer(SHA256.hash(user, "RPC", "guess"), frameMethod)
		peer.Auth = fmt.Appendf(nil, `{"realm":"RPC","username":%q,"nonce":%s,"cnonce":1,"algorithm":"SHA-256","response":%q}`, user, d.nonce, d.response)
		err := a.Authorize(t.Context(), peer, "OTA.Status", Read)
		if user == "" {
			require.Equal(t, errorf(400, "bad request"), err)
			continue
		}
		require.ErrorIs(t, err, ErrUnauthenticated)
		require.Contains(t, err.Error(), "wrong user or password")
	}
}

// Malformed auth members are bad requests, as in the original.
func TestFrameAuthMalformed(t *testing.T) {
	s := newTest(t, newFake(), withUsers(t, hashLine(t, SHA256, "admin", "secret"), nil))
	members := []string{`"realm":"RPC"`, `"username":"admin"`, `"nonce":1`, `"cnonce":1`, `"algorithm":"SHA-256"`, `"response":"x"`}
	ask := func(auth string) string {
		b, err := s.Call(t.Context(), testPeer, []byte(`{"id":1,"method":"OTA.Status","auth":`+auth+`}`))
		require.NoError(t, err)
		return string(b)
	}
	require.Contains(t, ask("{"+strings.Join(members, ",")+"}"), `"code":401`)
	require.Contains(t, ask("null"), `"code":401`)
	for i := range members {
		require.Contains(t, ask("{"+strings.Join(slices.Delete(slices.Clone(members), i, i+1), ",")+"}"), `"error":{"code":400,"message":"bad request"}`, members[i])
		s.limits = newLimiter(nil)
	}
	for _, other := range []string{`"realm":"x"`, `"algorithm":"MD5"`, `"algorithm":"SHA-512"`} {
		require.Contains(t, ask("{"+strings.Join(members, ",")+","+other+"}"), `"code":400`, other)
	}
	for _, bad := range []string{"1", `"x"`, "[]", "{}", `{"realm":{}}`} {
		require.Contains(t, ask(bad), `"code":400`, bad)
	}
}

func TestLimitListener(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	l := LimitListener(inner, 4)
	defer l.Close()
	accepted := make(chan net.Conn, 10)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", inner.Addr().String())
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial()
	dial()
	first := <-accepted
	<-accepted
	third := dial() // half of all are taken by one address
	require.NoError(t, third.SetReadDeadline(time.Now().Add(20*time.Second)))
	_, err = third.Read(make([]byte, 1))
	require.NotErrorIs(t, err, context.DeadlineExceeded)
	require.Error(t, err)
	require.Empty(t, accepted)
	require.NoError(t, first.Close())
	_ = first.Close()
	dial()
	<-accepted
	require.NoError(t, l.Close())
	<-ended
}

// Slow clients are given up: by a header that does not end, and by an idle
// connection.
func TestNewHTTPServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := servePipes(t, NewHTTPServer(newTest(t, newFake(), nil)))
		start := time.Now()
		c := n.send(t, "GET /rpc/OTA.Status HTTP/1.1\r\nHost: 127.0.0.1\r\n")
		_, err := io.ReadAll(c)
		require.NoError(t, err)
		require.Equal(t, headerTimeout, time.Since(start))
		c = n.send(t, "GET /rpc/OTA.Status HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: keep-alive\r\n\r\n")
		start = time.Now()
		_, err = io.ReadAll(c)
		require.NoError(t, err)
		require.Equal(t, idleTimeout, time.Since(start))
	})
}

func FuzzParsePasswords(f *testing.F) {
	f.Add("admin:RPC:cf685a4a101de8b1eec42ddc7c7efcf0\n# x\r\n\nop:RPC:0b19af53019667137bfba42cc23c38df04daaa77ee3b8b603b89babd4658d899")
	f.Add("a:RPC:" + strings.Repeat("0", 31))
	f.Add(":::\n\x00")
	f.Fuzz(func(t *testing.T, text string) {
		p, err := ParsePasswords(strings.NewReader(text), "RPC")
		if err != nil {
			require.ErrorIs(t, err, ota.ErrInvalid)
			require.Less(t, len(err.Error()), 300)
			return
		}
		n := 0
		for user, u := range p.users {
			require.NotEmpty(t, user)
			require.NotContains(t, user, ":")
			for a, h := range u {
				n++
				require.Len(t, h, 2*a.new().Size())
				require.Contains(t, strings.ToLower(text), strings.ToLower(user+":RPC:"+h))
			}
		}
		require.LessOrEqual(t, n, strings.Count(text, "\n")+1)
	})
}

func FuzzACL(f *testing.F) {
	f.Add(`[{"method":"OTA.*","ch_type":"HTTP","acl":"admin,+op?,-*"},{"method":"*","acl":"*"}]`, "HTTP", "OTA.Update", "admin")
	f.Add(`[{"ch_type":"UART","acl":"-*"}]`, "UART", "RPC.Ping", "x")
	f.Add(`[{"method":"**$|a","acl":"+,-,?"}]`, "", "a/b", "é")
	f.Fuzz(func(t *testing.T, text, channel, method, user string) {
		if len(method)+len(user) > 300 {
			return
		}
		acl, err := ParseACL([]byte(text))
		if err != nil {
			require.ErrorIs(t, err, ota.ErrInvalid)
			return
		}
		r := acl.rule(channel, method)
		if r.nobody() {
			if r != nil {
				require.False(t, r.allows(user))
			}
			return
		}
		if r.allows(user) && !r.everybody {
			require.True(t, slices.ContainsFunc(r.users, func(u userRule) bool { return u.allow && match(u.pattern, user) }))
		}
		require.True(t, match("**", user))
	})
}

func FuzzAuthorization(f *testing.F) {
	f.Add(`Digest username="admin", realm="RPC", uri="/rpc", algorithm=MD5, nonce="6b03e77f", nc=00000001, cnonce="35457778", qop=auth, response="de766e4ea1bd897ac870757478a3b3f3"`)
	f.Add(`Digest qop="auth", realm="R\"PC", nonce="6b03e77f", stale=true, algorithm=SHA-256`)
	f.Add("Bearer x")
	f.Add("digest a=b,,c=\"d\\\"e\" , f = g")
	p, err := ParsePasswords(strings.NewReader("admin:RPC:cf685a4a101de8b1eec42ddc7c7efcf0"), "RPC")
	require.NoError(f, err)
	a, err := NewAccess(AccessOptions{Passwords: p, Tokens: []Token{{"ci", HashToken("token")}}})
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, header string) {
		scheme, _, params, err := parseAuth(header)
		if err == nil {
			require.Equal(t, strings.ToLower(scheme), scheme)
			require.LessOrEqual(t, len(params), maxAuthParams)
			if d, err := headerDigest(params); err == nil {
				// What we write, we read.
				_, _, again, err := parseAuth(d.header())
				require.NoError(t, err)
				d2, err := headerDigest(again)
				require.NoError(t, err)
				d.opaque = ""
				require.Equal(t, d, d2)
			}
		}
		err = a.Authorize(t.Context(), httpAsk("127.0.0.1:1", header), "OTA.Update", Install)
		if fields := strings.Fields(header); len(fields) == 2 && strings.EqualFold(fields[0], "bearer") && fields[1] == "token" {
			return
		}
		require.ErrorIs(t, err, ErrUnauthenticated)
	})
}
