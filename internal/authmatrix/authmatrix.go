// Package authmatrix tests who may call what over a transport of package rpcjson:
// every method, with every right, by callers with all kinds of credentials.
package authmatrix

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/rpcjson"
)

// Transport is what is tested. One of Frames and HTTP is set.
type Transport struct {
	Name string
	// Frames starts to serve srv until t ends, and returns what sends a frame of a
	// client, always the same, and returns the reply to it. It may be called again
	// for other servers.
	Frames func(t *testing.T, srv *rpcjson.Server) (roundTrip func(frame []byte) (reply []byte, err error))
	// HTTP does so for a transport that takes credentials in the header
	// Authorization, and returns the client and the URL to post frames to.
	HTTP func(t *testing.T, srv *rpcjson.Server) (client *http.Client, url string)
	// Virtual runs the test in a bubble of testing/synctest, so that nonces become
	// too old by themselves. Elsewhere the server is told to forget them.
	Virtual bool
}

const (
	realm    = "RPC"
	learning = "learning" // the channel by which the rights are found out
)

// rights are those of the users.
var rights = map[string][]rpcjson.Right{
	"admin":     {rpcjson.Read, rpcjson.Operate, rpcjson.Install},
	"reader":    {rpcjson.Read},
	"operator":  {rpcjson.Operate},
	"installer": {rpcjson.Install},
	"outsider":  {},
}

// methods are those that a server has, with the rights that they need.
var methods = map[string]rpcjson.Right{
	"RPC.List": rpcjson.Read, "RPC.Describe": rpcjson.Read, "RPC.Ping": rpcjson.Read,
	"Sys.GetInfo": rpcjson.Read, "Sys.GetUID": rpcjson.Read, "Sys.Reboot": rpcjson.Operate,
	"OTA.Status": rpcjson.Read, "OTA.GetBootState": rpcjson.Read,
	"OTA.Commit": rpcjson.Operate, "OTA.Revert": rpcjson.Operate,
	"OTA.Update": rpcjson.Install, "OTA.Begin": rpcjson.Install, "OTA.Write": rpcjson.Install, "OTA.End": rpcjson.Install,
	"OTA.CreateSnapshot": rpcjson.Install, "OTA.SetBootState": rpcjson.Install,
}

// config is one way to say who may do what.
type config struct {
	name string
	set  func(*rpcjson.AccessOptions) error
	// anybody reports whether a method may be called without credentials, and
	// nobody whether it may not be called with any.
	anybody, nobody func(method string) bool
	allowed         func(user, method string) bool
}

func never(string) bool { return false }

var configs = []config{
	{
		"rights",
		func(o *rpcjson.AccessOptions) error { o.Rights = rights; return nil },
		never, never,
		func(user, method string) bool { return slices.Contains(rights[user], methods[method]) },
	},
	{
		"anonymous readers",
		func(o *rpcjson.AccessOptions) error {
			o.Rights, o.AllowAnonymous = rights, []rpcjson.Right{rpcjson.Read}
			return nil
		},
		func(method string) bool { return methods[method] == rpcjson.Read }, never,
		func(user, method string) bool { return slices.Contains(rights[user], methods[method]) },
	},
	{
		"access list",
		func(o *rpcjson.AccessOptions) (err error) {
			o.ACL, err = rpcjson.ParseACL([]byte(`[{"method":"RPC.*","acl":"*"},{"method":"Sys.GetUID","acl":"-*"},
				{"method":"OTA.*","ch_type":"nothing","acl":"*"},{"method":"OTA.*","acl":"adm*,+installer,-*"},{"method":"*","acl":"-reader,-outsider,*"}]`))
			return err
		},
		func(method string) bool { return strings.HasPrefix(method, "RPC.") },
		func(method string) bool { return method == "Sys.GetUID" },
		func(user, method string) bool {
			if strings.HasPrefix(method, "OTA.") {
				return user == "admin" || user == "installer"
			}
			return user != "reader" && user != "outsider"
		},
	},
}

// state is a kind of credentials.
type state struct {
	name string
	user string // whom they show, "" if nobody
	code int    // of the refusal, if they show nobody; 0 means 401
	// make returns the credentials for a challenge.
	make func(c *call) string
	// before, if not nil, spoils the challenge.
	before func(c *call)
	twice  bool // only the second call counts
}

// call is a call on its way.
type call struct {
	m         *matrix
	frame     bool
	algorithm string
	nonce     string
	uri       string
}

// sum returns the digest of parts joined by colons.
func (c *call) sum(parts ...string) string {
	var h hash.Hash = md5.New()
	if c.algorithm == "SHA-256" {
		h = sha256.New()
	}
	io.WriteString(h, strings.Join(parts, ":"))
	return hex.EncodeToString(h.Sum(nil))
}

func (c *call) digest(user, password string) string { return c.digestFor(user, password, realm, c.uri) }

func (c *call) digestFor(user, password, realm, uri string) string {
	ha1 := c.sum(user, realm, password)
	if c.frame {
		response := c.sum(ha1, c.nonce, "1", "42", "auth", c.sum("dummy_method", "dummy_uri"))
		return fmt.Sprintf(`{"realm":%q,"username":%q,"nonce":%s,"cnonce":42,"algorithm":%q,"response":%q}`, realm, user, c.nonce, c.algorithm, response)
	}
	response := c.sum(ha1, c.nonce, "00000001", "42", "auth", c.sum("POST", uri))
	return fmt.Sprintf(`Digest username=%q, realm=%q, uri=%q, algorithm=%s, nonce=%q, nc=00000001, cnonce="42", qop=auth, response=%q`,
		user, realm, uri, c.algorithm, c.nonce, response)
}

func states(frame bool) []state {
	admin := func(c *call) string { return c.digest("admin", "password of admin") }
	list := []state{
		{name: "none", make: func(*call) string { return "" }},
		{name: "wrong password", make: func(c *call) string { return c.digest("admin", "wrong") }},
		{name: "unknown user", make: func(c *call) string { return c.digest("nobody", "wrong") }},
		{name: "expired nonce", make: admin, before: func(c *call) { c.m.expire() }},
		{name: "invented nonce", make: admin, before: func(c *call) {
			last := c.nonce[len(c.nonce)-1]
			c.nonce = c.nonce[:len(c.nonce)-1] + map[bool]string{true: "1", false: "2"}[last == '2']
		}},
		{name: "nonce of another peer", make: admin, before: func(c *call) { c.nonce = c.m.foreignNonce() }},
		{name: "replayed", make: admin, twice: true},
	}
	malformed := 400
	if !frame {
		malformed = 401
		list = append(list,
			state{name: "digest of another URI", make: func(c *call) string { return c.digestFor("admin", "password of admin", realm, "/other") }},
			state{name: "basic", make: func(*call) string { return "Basic YWRtaW46cGFzc3dvcmQgb2YgYWRtaW4=" }},
			state{name: "wrong token", make: func(*call) string { return "Bearer wrong" }},
		)
		for user := range rights {
			list = append(list, state{name: "token of " + user, user: user, make: func(*call) string { return "Bearer token of " + user }})
		}
	}
	list = append(list,
		state{name: "wrong realm", code: malformed, make: func(c *call) string { return c.digestFor("admin", "password of admin", "x", c.uri) }},
		state{name: "malformed", code: malformed, make: func(c *call) string {
			return strings.Replace(c.digest("admin", "password of admin"), "cnonce", "conce", 1)
		}},
	)
	for user := range rights {
		list = append(list, state{name: "password of " + user, user: user, make: func(c *call) string { return c.digest(user, "password of "+user) }})
	}
	return list
}

// matrix is the test of one transport with one configuration.
type matrix struct {
	t         *testing.T
	tr        *Transport
	algorithm string
	access    *rpcjson.Access
	srv       *rpcjson.Server

	mu      sync.Mutex
	reached []string // methods that ran
	asked   map[string]rpcjson.Right

	send func(frame []byte, credentials string) (reply []byte, challenges []string)
	uri  string
}

// Run runs the whole matrix. It logs how many cells it has asserted.
func Run(t *testing.T, tr Transport) {
	cells := 0
	for _, c := range configs {
		for _, algorithm := range []rpcjson.Algorithm{rpcjson.MD5, rpcjson.SHA256} {
			t.Run(fmt.Sprintf("%s/%s/%s", tr.Name, c.name, algorithm), func(t *testing.T) {
				test := func(t *testing.T) { cells += run(t, &tr, &c, algorithm) }
				if tr.Virtual {
					synctest.Test(t, test)
				} else {
					test(t)
				}
			})
		}
	}
	t.Logf("%s: %d cells", tr.Name, cells)
}

// run tests one configuration and returns how many cells it has asserted.
func run(t *testing.T, tr *Transport, c *config, algorithm rpcjson.Algorithm) (cells int) {
	m := start(t, tr, c, algorithm)
	for _, s := range states(tr.HTTP == nil) {
		for _, method := range slices.Sorted(maps.Keys(methods)) {
			m.cell(c, &s, method)
			cells++
		}
	}
	for name, right := range m.asked {
		if want, ok := methods[name]; !ok || want != right {
			t.Errorf("%s needs %v here, but %v according to the server", name, want, right)
		}
	}
	if len(m.asked) != len(methods) {
		t.Errorf("%d of %d methods were asked about", len(m.asked), len(methods))
	}
	return cells
}

func start(t *testing.T, tr *Transport, c *config, algorithm rpcjson.Algorithm) *matrix {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	m := &matrix{t: t, tr: tr, algorithm: string(algorithm), asked: map[string]rpcjson.Right{}}
	var lines strings.Builder
	o := rpcjson.AccessOptions{}
	for user := range rights {
		line, err := rpcjson.HashPassword(algorithm, user, realm, "password of "+user)
		check(err)
		fmt.Fprintln(&lines, line)
		o.Tokens = append(o.Tokens, rpcjson.Token{User: user, Hash: rpcjson.HashToken("token of " + user)})
	}
	var err error
	o.Passwords, err = rpcjson.ParsePasswords(strings.NewReader(lines.String()), realm)
	check(err)
	check(c.set(&o))
	m.access, err = rpcjson.NewAccess(o)
	check(err)
	many := rpcjson.Rate{PerSecond: 1, Burst: 1 << 20}
	m.srv, err = rpcjson.New(new(ota.Device), rpcjson.Options{
		ID: "device", Authorizer: recorder{m.access, m},
		Limits: &rpcjson.Limits{Requests: many, TotalRequests: many, Logins: many, TotalLogins: many},
	})
	check(err)
	t.Cleanup(func() { check(m.srv.Close()) })
	// Learn which rights the server asks for, then put stubs with the same ones in
	// the place of the methods.
	for method := range methods {
		_, err := m.srv.Call(t.Context(), rpcjson.Peer{Channel: learning}, frame(1, method, ""))
		check(err)
	}
	m.reached = nil
	for method, right := range m.asked {
		check(m.srv.Handle(method, "", right, func(context.Context, *rpcjson.Request) (any, error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.reached = append(m.reached, method)
			return true, nil
		}))
	}
	if tr.HTTP != nil {
		client, url := tr.HTTP(t, m.srv)
		m.uri = regexp.MustCompile(`^[a-z]+://[^/]*`).ReplaceAllString(url, "")
		m.send = func(frame []byte, credentials string) ([]byte, []string) {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, bytes.NewReader(frame))
			check(err)
			req.Header.Set("Content-Type", "application/json")
			req.Header.Set("Connection", "keep-alive") // for speed
			if credentials != "" {
				req.Header.Set("Authorization", credentials)
			}
			res, err := client.Do(req)
			check(err)
			defer res.Body.Close()
			b, err := io.ReadAll(res.Body)
			check(err)
			if res.StatusCode == http.StatusUnauthorized {
				return []byte(`{"error":{"code":401}}`), res.Header.Values("WWW-Authenticate")
			}
			if res.StatusCode != http.StatusOK {
				t.Fatalf("HTTP status %s", res.Status)
			}
			return b, nil
		}
		return m
	}
	roundTrip := tr.Frames(t, m.srv)
	m.send = func(frame []byte, credentials string) ([]byte, []string) {
		if credentials != "" {
			frame = fmt.Appendf(nil, `%s,"auth":%s}`, frame[:len(frame)-1], credentials)
		}
		b, err := roundTrip(frame)
		check(err)
		var r struct{ Error struct{ Message string } }
		if json.Unmarshal(b, &r) != nil {
			t.Fatalf("no reply: %q", b)
		}
		return b, []string{r.Error.Message}
	}
	return m
}

// recorder notes what the server asks.
type recorder struct {
	*rpcjson.Access
	m *matrix
}

// Authorize implements rpcjson.Authorizer.
func (r recorder) Authorize(ctx context.Context, peer *rpcjson.Peer, method string, right rpcjson.Right) error {
	r.m.mu.Lock()
	r.m.asked[method] = right
	r.m.mu.Unlock()
	if peer.Channel == learning {
		return rpcjson.ErrForbidden
	}
	return r.Access.Authorize(ctx, peer, method, right)
}

func frame(id int, method, more string) []byte {
	return fmt.Appendf(nil, `{"src":"matrix","id":%d,"method":"%s"%s}`, id, method, more)
}

func (m *matrix) expire() {
	if m.tr.Virtual {
		time.Sleep(3 * time.Minute) // longer than the life of one in a frame, shorter than its clock
		return
	}
	m.access.ForgetNonces()
}

var nonceOf = regexp.MustCompile(`"?nonce"?(?:=|: )"?([\w-]+)`)

// challenge gets a nonce by a call that everybody is refused.
func (m *matrix) challenge() string {
	for _, method := range []string{"OTA.Update", "Sys.Reboot"} {
		_, challenges := m.send(frame(2, method, ""), "")
		for _, c := range challenges {
			if n := nonceOf.FindStringSubmatch(c); n != nil {
				return n[1]
			}
		}
	}
	m.t.Fatal("no challenge")
	return ""
}

// foreignNonce returns a nonce that was issued to somebody else.
func (m *matrix) foreignNonce() string {
	var text string
	const addr = "192.0.2.77:1"
	if m.tr.HTTP != nil {
		r := httptest.NewRequest(http.MethodPost, m.uri, bytes.NewReader(frame(3, "OTA.Update", "")))
		r.Host, r.RemoteAddr = "127.0.0.1", addr
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		m.srv.ServeHTTP(w, r)
		text = w.Header().Get("WWW-Authenticate")
	} else {
		b, err := m.srv.Call(m.t.Context(), rpcjson.Peer{Channel: "elsewhere", Addr: addr}, frame(3, "OTA.Update", ""))
		if err != nil {
			m.t.Fatal(err)
		}
		text = strings.ReplaceAll(string(b), `\"`, `"`)
	}
	n := nonceOf.FindStringSubmatch(text)
	if n == nil {
		m.t.Fatalf("no challenge: %s", text)
	}
	return n[1]
}

// cell asserts what becomes of one call.
func (m *matrix) cell(c *config, s *state, method string) {
	m.t.Helper()
	k := &call{m: m, frame: m.tr.HTTP == nil, algorithm: m.algorithm, uri: m.uri, nonce: m.challenge()}
	if s.before != nil {
		s.before(k)
	}
	credentials := s.make(k)
	want := 0
	switch {
	case c.anybody(method):
	case c.nobody(method):
		want = 403
	case s.user == "" && s.code != 0:
		want = s.code
	case s.user == "":
		want = 401
	case !c.allowed(s.user, method):
		want = 403
	}
	if s.twice {
		// Spent on a call that asks for a user.
		m.send(frame(4, "OTA.Update", ""), credentials)
	}
	m.mu.Lock()
	m.reached = nil
	m.mu.Unlock()
	b, _ := m.send(frame(5, method, ""), credentials)
	var r struct {
		Result json.RawMessage
		Error  *struct{ Code int }
	}
	if err := json.Unmarshal(b, &r); err != nil {
		m.t.Errorf("%s, %s: no reply: %q", method, s.name, b)
		return
	}
	m.mu.Lock()
	reached := strings.Join(m.reached, " ")
	m.mu.Unlock()
	got, ran := 0, method
	if r.Error != nil {
		got = r.Error.Code
	}
	if want != 0 {
		ran = ""
	}
	if got != want || reached != ran || want == 0 && string(r.Result) != "true" {
		m.t.Errorf("%s, %s: answered %d, need %d; ran %q, need %q", method, s.name, got, want, reached, ran)
	}
}
