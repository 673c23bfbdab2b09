// Package authmatrix tests who may call what over a transport of package rpcjson:
// every method, with every right, by callers with all kinds of credentials.
package authmatrix

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"math/big"
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
	// Channel is its type in access lists (mongoose-os-libs/rpc-common,
	// src/mgos_rpc.c).
	Channel string
	// Frames starts to serve srv until t ends, and returns what opens a channel to
	// it for one client, always the same. It may be called again for other servers.
	Frames func(t *testing.T, srv *rpcjson.Server, pki *PKI) func(Opening) (RoundTrip, error)
	// Headers says that channels are opened by HTTP, with GET /rpc, and so with what
	// is in its header; Users, that the transport can know whom a channel belongs to.
	Headers, Users bool
	// HTTP does so for a transport that takes credentials in the header of each
	// call, and returns the URL to post frames to, and what makes a client that
	// shows a certificate, none if it is nil.
	HTTP func(t *testing.T, srv *rpcjson.Server, pki *PKI) (client func(*tls.Certificate) *http.Client, url string)
	// Certs says that clients, or channels, may have certificates.
	Certs bool
	// Virtual runs the test in a bubble of testing/synctest, so that nonces become
	// too old by themselves. Elsewhere the server is told to forget them.
	Virtual bool
}

// RoundTrip sends a frame and returns the reply to it.
type RoundTrip func(frame []byte) (reply []byte, err error)

// Opening is how a channel is opened. The zero value shows nothing.
type Opening struct {
	Header string           // Authorization, if the transport has Headers
	User   string           // if it has Users
	Cert   *tls.Certificate // if it has Certs
}

// Refused is the error for a channel that was not opened.
type Refused struct {
	Status     int
	Challenges []string // values of WWW-Authenticate
}

func (r *Refused) Error() string { return fmt.Sprint("refused: ", r.Status) }

// PKI has the certificates of a test.
type PKI struct {
	Pool  *x509.CertPool // of the authority
	certs map[string]*tls.Certificate
}

// certificate names beside the users.
const (
	nobodys   = "nobody"   // by the authority, but of no user
	strangers = "stranger" // the same by another authority, of admin
)

func newPKI(t *testing.T) *PKI {
	p := &PKI{Pool: x509.NewCertPool(), certs: map[string]*tls.Certificate{}}
	now := time.Now()
	serial := int64(0)
	issue := func(name string, ca bool, by *tls.Certificate) *tls.Certificate {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		check(t, err)
		serial++
		c := &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
			NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour), IsCA: ca, BasicConstraintsValid: true,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, KeyUsage: x509.KeyUsageDigitalSignature,
		}
		parent, signer := c, key
		if ca {
			c.KeyUsage = x509.KeyUsageCertSign
		} else {
			parent, signer = by.Leaf, by.PrivateKey.(*ecdsa.PrivateKey)
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
		check(t, err)
		c, err = x509.ParseCertificate(der)
		check(t, err)
		return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: c}
	}
	authority, other := issue("authority", true, nil), issue("authority", true, nil)
	p.Pool.AddCert(authority.Leaf)
	for user := range rights {
		p.certs[user] = issue(user, false, authority)
	}
	p.certs[nobodys] = issue(nobodys, false, authority)
	p.certs[strangers] = issue("admin", false, other)
	return p
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
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
	set  func(o *rpcjson.AccessOptions, channel string) error
	// anybody reports whether a method may be called without credentials, and
	// nobody whether it may not be called with any.
	anybody, nobody func(method string) bool
	allowed         func(user, method string) bool
}

func never(string) bool { return false }

var configs = []config{
	{
		"rights",
		func(o *rpcjson.AccessOptions, _ string) error { o.Rights = rights; return nil },
		never, never,
		func(user, method string) bool { return slices.Contains(rights[user], methods[method]) },
	},
	{
		"anonymous readers",
		func(o *rpcjson.AccessOptions, _ string) error {
			o.Rights, o.AllowAnonymous = rights, []rpcjson.Right{rpcjson.Read}
			return nil
		},
		func(method string) bool { return methods[method] == rpcjson.Read }, never,
		func(user, method string) bool { return slices.Contains(rights[user], methods[method]) },
	},
	{
		"access list",
		func(o *rpcjson.AccessOptions, channel string) (err error) {
			o.ACL, err = rpcjson.ParseACL([]byte(`[{"method":"RPC.*","acl":"*"},{"method":"Sys.GetUID","acl":"-*"},
				{"method":"Sys.GetInfo","ch_type":"` + channel + `","acl":"*"},{"method":"Sys.GetInfo","acl":"-*"},
				{"method":"OTA.*","ch_type":"nothing","acl":"*"},{"method":"OTA.*","acl":"adm*,+installer,-*"},{"method":"*","acl":"-reader,-outsider,*"}]`))
			return err
		},
		func(method string) bool { return strings.HasPrefix(method, "RPC.") || method == "Sys.GetInfo" },
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
	// make returns the credentials for a challenge; nil means none.
	make func(c *call) string
	// before, if not nil, spoils the challenge.
	before func(c *call)
	twice  bool // only the second call counts

	// How the channel is opened.
	opened opened
	cert   string // whose certificate the client shows
	shut   bool   // there is no channel, whatever is to be called
}

// opened is a kind of credentials that a channel is opened with.
type opened struct {
	header func(c *call) string
	before func(c *call)
	twice  bool // only the second attempt counts
	user   string
}

// call is a call on its way.
type call struct {
	m         *matrix
	frame     bool
	algorithm string
	nonce     string
	verb, uri string // of the request whose header has the digest
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
	response := c.sum(ha1, c.nonce, "00000001", "42", "auth", c.sum(c.verb, uri))
	return fmt.Sprintf(`Digest username=%q, realm=%q, uri=%q, algorithm=%s, nonce=%q, nc=00000001, cnonce="42", qop=auth, response=%q`,
		user, realm, uri, c.algorithm, c.nonce, response)
}

// states returns all that a transport can have.
func states(tr *Transport) []state {
	list := append([]state{{name: "none"}}, digests(tr.HTTP == nil)...)
	if tr.HTTP != nil {
		list = append(list, headers()...)
	}
	if tr.Headers {
		// Whoever opens a channel with credentials is known by them for all calls; with
		// wrong ones there is no channel.
		for _, s := range append(digests(false), headers()...) {
			list = append(list, state{
				name: "opened with " + s.name, user: s.user, shut: s.user == "",
				opened: opened{header: s.make, before: s.before, twice: s.twice},
			})
		}
	}
	// Those of a call count more than those of its channel, also if they are wrong.
	over := func(name string, set func(user string, s *state)) {
		for user := range rights {
			s := state{name: name + " of " + user, user: user}
			set(user, &s)
			list = append(list, s)
		}
		for _, s := range digests(tr.HTTP == nil) {
			if s.before == nil && !s.twice {
				s.name += ", over the " + name + " of another"
				other := "admin"
				if s.user == other {
					other = "outsider"
				}
				set(other, &s)
				list = append(list, s)
			}
		}
	}
	if tr.Headers {
		over("channel with the token", func(user string, s *state) {
			s.opened = opened{header: func(*call) string { return "Bearer token of " + user }}
		})
	}
	if tr.Users {
		over("channel", func(user string, s *state) { s.opened.user = user })
	}
	if tr.Certs {
		over("certificate", func(user string, s *state) { s.cert = user })
		list = append(list, state{name: "certificate of nobody", cert: nobodys}, state{name: "certificate by another authority", cert: strangers, shut: true})
	}
	return list
}

// digests are the states of digest authentication, in frames or headers.
func digests(frame bool) []state {
	admin := func(c *call) string { return c.digest("admin", "password of admin") }
	malformed := 400
	if !frame {
		malformed = 401
	}
	list := []state{
		{name: "wrong password", make: func(c *call) string { return c.digest("admin", "wrong") }},
		{name: "unknown user", make: func(c *call) string { return c.digest("nobody", "wrong") }},
		{name: "expired nonce", make: admin, before: func(c *call) { c.m.expire() }},
		{name: "invented nonce", make: admin, before: func(c *call) {
			last := c.nonce[len(c.nonce)-1]
			c.nonce = c.nonce[:len(c.nonce)-1] + map[bool]string{true: "1", false: "2"}[last == '2']
		}},
		{name: "nonce of another peer", make: admin, before: func(c *call) { c.nonce = c.m.foreignNonce(c.frame) }},
		{name: "replayed", make: admin, twice: true},
		{name: "wrong realm", code: malformed, make: func(c *call) string { return c.digestFor("admin", "password of admin", "x", c.uri) }},
		{name: "malformed", code: malformed, make: func(c *call) string {
			return strings.Replace(c.digest("admin", "password of admin"), "cnonce", "conce", 1)
		}},
	}
	for user := range rights {
		list = append(list, state{name: "password of " + user, user: user, make: func(c *call) string { return c.digest(user, "password of "+user) }})
	}
	return list
}

// headers are the further states of the header Authorization.
func headers() []state {
	list := []state{
		{name: "digest of another URI", make: func(c *call) string { return c.digestFor("admin", "password of admin", realm, "/other") }},
		{name: "basic", make: func(*call) string { return "Basic YWRtaW46cGFzc3dvcmQgb2YgYWRtaW4=" }},
		{name: "wrong token", make: func(*call) string { return "Bearer wrong" }},
	}
	for user := range rights {
		list = append(list, state{name: "token of " + user, user: user, make: func(*call) string { return "Bearer token of " + user }})
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
	pki       *PKI

	mu      sync.Mutex
	reached []string // methods that ran
	asked   map[string]rpcjson.Right

	id   int
	open func(Opening) (RoundTrip, error)    // of frames
	http func(*tls.Certificate) *http.Client // else
	webs map[*tls.Certificate]*http.Client   // that it returned
	url  string
	uri  string
}

// client sends frames with credentials. The error is for frames that get no reply.
type client func(frame []byte, credentials string) (reply []byte, challenges []string, err error)

// Run runs the whole matrix. It logs how many cells it has asserted.
func Run(t *testing.T, tr Transport) {
	var pki *PKI
	if tr.Certs {
		pki = newPKI(t)
	}
	cells := 0
	for _, c := range configs {
		for _, algorithm := range []rpcjson.Algorithm{rpcjson.MD5, rpcjson.SHA256} {
			t.Run(fmt.Sprintf("%s/%s/%s", tr.Name, c.name, algorithm), func(t *testing.T) {
				test := func(t *testing.T) { cells += run(t, &tr, &c, algorithm, pki) }
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
func run(t *testing.T, tr *Transport, c *config, algorithm rpcjson.Algorithm, pki *PKI) (cells int) {
	m := start(t, tr, c, algorithm, pki)
	anonymous, err := m.connect(&state{})
	check(t, err)
	for _, s := range states(tr) {
		use := anonymous
		if s.shut {
			m.shut(&s) // whatever is to be called
			cells++
			continue
		}
		if s.cert != "" || s.opened.header != nil || s.opened.user != "" {
			use, err = m.connect(&s)
			check(t, err)
		}
		for _, method := range slices.Sorted(maps.Keys(methods)) {
			m.cell(c, &s, method, use)
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

func start(t *testing.T, tr *Transport, c *config, algorithm rpcjson.Algorithm, pki *PKI) *matrix {
	t.Helper()
	m := &matrix{t: t, tr: tr, algorithm: string(algorithm), pki: pki, asked: map[string]rpcjson.Right{}, webs: map[*tls.Certificate]*http.Client{}}
	var lines strings.Builder
	o := rpcjson.AccessOptions{CertUser: func(c *x509.Certificate) string {
		if name := rpcjson.CommonName(c); name != nobodys {
			return name
		}
		return ""
	}}
	for user := range rights {
		line, err := rpcjson.HashPassword(algorithm, user, realm, "password of "+user)
		check(t, err)
		fmt.Fprintln(&lines, line)
		o.Tokens = append(o.Tokens, rpcjson.Token{User: user, Hash: rpcjson.HashToken("token of " + user)})
	}
	var err error
	o.Passwords, err = rpcjson.ParsePasswords(strings.NewReader(lines.String()), realm)
	check(t, err)
	check(t, c.set(&o, tr.Channel))
	m.access, err = rpcjson.NewAccess(o)
	check(t, err)
	many := rpcjson.Rate{PerSecond: 1, Burst: 1 << 20}
	m.srv, err = rpcjson.New(new(ota.Device), rpcjson.Options{
		ID: "device", Authorizer: recorder{m.access, m},
		Limits: &rpcjson.Limits{Requests: many, TotalRequests: many, Logins: many, TotalLogins: many},
	})
	check(t, err)
	t.Cleanup(func() { check(t, m.srv.Close()) })
	// Learn which rights the server asks for, then put stubs with the same ones in
	// the place of the methods.
	for method := range methods {
		_, err := m.srv.Call(t.Context(), rpcjson.Peer{Channel: learning}, m.frame(method))
		check(t, err)
	}
	m.reached = nil
	for method, right := range m.asked {
		check(t, m.srv.Handle(method, "", right, func(context.Context, *rpcjson.Request) (any, error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.reached = append(m.reached, method)
			return true, nil
		}))
	}
	if tr.HTTP != nil {
		m.http, m.url = tr.HTTP(t, m.srv, pki)
		m.uri = regexp.MustCompile(`^[a-z]+://[^/]*`).ReplaceAllString(m.url, "")
	} else {
		m.open = tr.Frames(t, m.srv, pki)
	}
	return m
}

// connect opens what a state needs. The error is a *Refused if the other side does
// not want it.
func (m *matrix) connect(s *state) (client, error) {
	var cert *tls.Certificate
	if s.cert != "" {
		cert = m.pki.certs[s.cert]
	}
	if m.http != nil {
		if m.webs[cert] == nil {
			m.webs[cert] = m.http(cert)
		}
		return m.webClient(m.webs[cert]), nil
	}
	o := Opening{User: s.opened.user, Cert: cert}
	if s.opened.header != nil {
		k := &call{m: m, algorithm: m.algorithm, verb: http.MethodGet, uri: "/rpc", nonce: m.channelNonce()}
		if s.opened.before != nil {
			s.opened.before(k)
		}
		o.Header = s.opened.header(k)
	}
	roundTrip, err := m.open(o)
	if s.opened.twice {
		check(m.t, err) // that was the first time
		roundTrip, err = m.open(o)
	}
	return m.frameClient(roundTrip), err
}

func (m *matrix) webClient(web *http.Client) client {
	return func(frame []byte, credentials string) ([]byte, []string, error) {
		req, err := http.NewRequestWithContext(m.t.Context(), http.MethodPost, m.url, bytes.NewReader(frame))
		check(m.t, err)
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Connection", "keep-alive") // for speed
		if credentials != "" {
			req.Header.Set("Authorization", credentials)
		}
		res, err := web.Do(req)
		if err != nil {
			return nil, nil, err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		check(m.t, err)
		if res.StatusCode == http.StatusUnauthorized {
			return []byte(`{"error":{"code":401}}`), res.Header.Values("WWW-Authenticate"), nil
		}
		if res.StatusCode != http.StatusOK {
			m.t.Fatalf("HTTP status %s", res.Status)
		}
		return b, nil, nil
	}
}

func (m *matrix) frameClient(roundTrip RoundTrip) client {
	return func(frame []byte, credentials string) ([]byte, []string, error) {
		if credentials != "" {
			frame = fmt.Appendf(nil, `%s,"auth":%s}`, frame[:len(frame)-1], credentials)
		}
		b, err := roundTrip(frame)
		if err != nil {
			return nil, nil, err
		}
		var r struct{ Error struct{ Message string } }
		if json.Unmarshal(b, &r) != nil {
			m.t.Fatalf("no reply: %q", b)
		}
		return b, []string{r.Error.Message}, nil
	}
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

// frame returns a call with an id of its own, as of one that must not be taken for
// a repetition.
func (m *matrix) frame(method string) []byte {
	m.id++
	return fmt.Appendf(nil, `{"src":"matrix","id":%d,"method":"%s"}`, m.id, method)
}

func (m *matrix) expire() {
	if m.tr.Virtual {
		time.Sleep(3 * time.Minute) // longer than the life of one in a frame, shorter than its clock
		return
	}
	m.access.ForgetNonces()
}

var nonceOf = regexp.MustCompile(`"?nonce"?(?:=|: )"?([\w-]+)`)

func (m *matrix) nonceIn(challenges ...string) string {
	m.t.Helper()
	for _, c := range challenges {
		if n := nonceOf.FindStringSubmatch(c); n != nil {
			return n[1]
		}
	}
	m.t.Fatalf("no challenge in %q", challenges)
	return ""
}

// nonce gets one by a call that everybody without credentials is refused. Where the
// channel has some already it is one that they are refused for, too.
func (m *matrix) nonce(use client) string {
	m.t.Helper()
	_, challenges, err := use(m.frame("OTA.Update"), m.wrong())
	check(m.t, err)
	return m.nonceIn(challenges...)
}

// wrong returns credentials that are not valid, whoever may call.
func (m *matrix) wrong() string {
	if m.http != nil {
		return "Bearer wrong"
	}
	k := &call{m: m, frame: true, algorithm: m.algorithm, nonce: "4503599627370496"}
	return k.digest("nobody", "wrong")
}

// channelNonce gets a nonce for opening a channel.
func (m *matrix) channelNonce() string {
	m.t.Helper()
	_, err := m.open(Opening{Header: "Bearer wrong"})
	var r *Refused
	if !errors.As(err, &r) {
		m.t.Fatalf("not refused: %v", err)
	}
	return m.nonceIn(r.Challenges...)
}

// foreignNonce returns a nonce that was issued to somebody else.
func (m *matrix) foreignNonce(frame bool) string {
	const addr = "192.0.2.77:1"
	if !frame {
		r := httptest.NewRequest(http.MethodPost, "/rpc", bytes.NewReader(m.frame("OTA.Update")))
		r.Host, r.RemoteAddr = "127.0.0.1", addr
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		m.srv.ServeHTTP(w, r)
		return m.nonceIn(w.Header().Get("WWW-Authenticate"))
	}
	b, err := m.srv.Call(m.t.Context(), rpcjson.Peer{Channel: "elsewhere", Addr: addr}, m.frame("OTA.Update"))
	check(m.t, err)
	return m.nonceIn(strings.ReplaceAll(string(b), `\"`, `"`))
}

// want returns the code of the answer to a call, 0 for a result. It is the one rule
// for all transports.
func (c *config) want(s *state, method string) int {
	switch {
	case c.anybody(method):
		return 0
	case c.nobody(method):
		return 403
	case s.user == "" && s.code != 0:
		return s.code
	case s.user == "":
		return 401
	case !c.allowed(s.user, method):
		return 403
	}
	return 0
}

// ran returns which methods have run since the last time.
func (m *matrix) ran() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	defer func() { m.reached = nil }()
	return strings.Join(m.reached, " ")
}

// shut asserts that no call can be made.
func (m *matrix) shut(s *state) {
	m.t.Helper()
	use, err := m.connect(s)
	var refused *Refused
	switch {
	case err == nil && m.http != nil: // it shows with the first call
		if _, _, err = use(m.frame("RPC.List"), ""); err == nil {
			m.t.Errorf("%s: answered", s.name)
		}
	case err != nil && s.cert != "": // in the handshake of TLS
	case !errors.As(err, &refused) || refused.Status != http.StatusUnauthorized:
		m.t.Errorf("%s: channel not refused by 401: %v", s.name, err)
	}
	if ran := m.ran(); ran != "" {
		m.t.Errorf("%s: ran %q", s.name, ran)
	}
}

// cell asserts what becomes of one call.
func (m *matrix) cell(c *config, s *state, method string, use client) {
	m.t.Helper()
	credentials := ""
	if s.make != nil {
		k := &call{m: m, frame: m.http == nil, algorithm: m.algorithm, verb: http.MethodPost, uri: m.uri, nonce: m.nonce(use)}
		if s.before != nil {
			s.before(k)
		}
		credentials = s.make(k)
	}
	if s.twice {
		// Spent on a call that asks for a user.
		_, _, err := use(m.frame("OTA.Update"), credentials)
		check(m.t, err)
	}
	m.ran()
	b, _, err := use(m.frame(method), credentials)
	check(m.t, err)
	var r struct {
		Result json.RawMessage
		Error  *struct{ Code int }
	}
	if err := json.Unmarshal(b, &r); err != nil {
		m.t.Errorf("%s, %s: no reply: %q", method, s.name, b)
		return
	}
	got, ran, want := 0, method, c.want(s, method)
	if r.Error != nil {
		got = r.Error.Code
	}
	if want != 0 {
		ran = ""
	}
	if reached := m.ran(); got != want || reached != ran || want == 0 && string(r.Result) != "true" {
		m.t.Errorf("%s, %s: answered %d, need %d; ran %q, need %q", method, s.name, got, want, reached, ran)
	}
}
