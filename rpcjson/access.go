package rpcjson

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/slotota/ota"
)

// Token is a bearer token (RFC 6750), of which only the hash is kept.
type Token struct {
	User string
	Hash [sha256.Size]byte
}

// HashToken returns the hash of a token. The token must be random (see
// [NewToken]): one that can be guessed can be found by its hash.
func HashToken(token string) [sha256.Size]byte { return sha256.Sum256([]byte(token)) }

// NewToken returns a random token of 256 bits, in 43 characters.
func NewToken() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails
	return base64.RawURLEncoding.EncodeToString(b[:])
}

// AccessOptions say who may do what. The zero value is refused, as nobody may do
// anything by it.
type AccessOptions struct {
	// Passwords are the users that may authenticate themselves by digest, in the
	// header Authorization of HTTP (RFC 7616) or in frames as mos does. nil
	// means none.
	Passwords *Passwords
	// Tokens authenticate over HTTP, and for channels that are opened by HTTP.
	Tokens []Token
	// AllowPlainTokens accepts tokens also without TLS from other hosts, where
	// everybody on the way can read them.
	AllowPlainTokens bool
	// CertUser returns the user that a client certificate stands for, "" for
	// none. The certificate has been verified by what [tls.Config] says. nil
	// means that certificates stand for nobody. See [MutualTLS].
	CertUser func(*x509.Certificate) string

	// Rights are what each user may do, in place of ACL. nil means that
	// everybody who is a user may do everything.
	Rights map[string][]Right
	// AllowAnonymous is what everybody may do, without credentials.
	AllowAnonymous []Right
	// ACL decides in place of Rights and AllowAnonymous.
	ACL *ACL
}

// Access is the [Authorizer] for users with passwords, tokens and certificates,
// over all transports.
//
// Passwords never travel. A nonce holds for the peer it was issued to, for two
// minutes in frames and five in headers, until the next start of the program, and
// authorizes each request once. What is digested in a frame is neither the method
// nor its arguments, and over HTTP not the body: somebody who can change what is
// on its way can put another call in its place. TLS is against that.
//
// All methods may be called concurrently.
type Access struct {
	o       AccessOptions
	nonces  *nonces
	offered []Algorithm
	decoy   [32]byte // for hashes of users that there are not
}

// NewAccess returns an Access. The error wraps [ota.ErrInvalid].
func NewAccess(o AccessOptions) (*Access, error) {
	bad := func(format string, args ...any) (*Access, error) {
		return nil, fmt.Errorf("rpcjson: access: %w: %w", fmt.Errorf(format, args...), ota.ErrInvalid)
	}
	switch {
	case o.ACL != nil && (o.Rights != nil || o.AllowAnonymous != nil):
		return bad("ACL excludes Rights and AllowAnonymous")
	case (o.Passwords == nil || len(o.Passwords.users) == 0) && len(o.Tokens) == 0 && o.CertUser == nil && o.AllowAnonymous == nil && o.ACL == nil && o.Rights == nil:
		return bad("nobody can ever be authorized")
	}
	for i, t := range o.Tokens {
		switch {
		case t.User == "":
			return bad("token %d: no user", i)
		case t.Hash == [sha256.Size]byte{} || t.Hash == HashToken(""):
			return bad("token %d: empty", i)
		}
	}
	for user, rights := range o.Rights {
		if user == "" {
			return bad("Rights: a user without name; use AllowAnonymous")
		}
		for _, r := range rights {
			if r < Read || r > Install {
				return bad("Rights: user %s: right %v", ota.Quote(user), r)
			}
		}
	}
	a := &Access{o: o, nonces: newNonces()}
	if o.Passwords != nil {
		a.offered = o.Passwords.offered()
	}
	_, _ = rand.Read(a.decoy[:]) // never fails
	return a, nil
}

// ForgetNonces makes all nonces issued so far invalid, as if they had become too old.
func (a *Access) ForgetNonces() { a.nonces.reset() }

// denial is a refusal by Access.
type denial struct {
	err    error
	why    string   // for the log
	header []string // challenges of an HTTP answer
	frame  string   // challenge of a reply
	stale  bool     // the credentials were right, but used or too old
}

func (d *denial) Error() string { return d.err.Error() + ": " + d.why }
func (d *denial) Unwrap() error { return d.err }

// Authorize implements [Authorizer].
func (a *Access) Authorize(_ context.Context, peer *Peer, method string, right Right) error {
	var r *rule
	if a.o.ACL != nil {
		r = a.o.ACL.rule(peer.Channel, method)
		switch {
		case r.nobody():
			return &denial{err: ErrForbidden, why: "by the access list"}
		case r.everybody:
			return nil
		}
	} else if slices.Contains(a.o.AllowAnonymous, right) {
		return nil
	}
	user, err := a.user(peer)
	switch {
	case err != nil:
		return err
	case user == "":
		return a.challenge(peer, "no credentials", false)
	}
	peer.User = user
	allowed := a.o.Rights == nil || slices.Contains(a.o.Rights[user], right)
	if r != nil {
		allowed = r.allows(user)
	}
	if !allowed {
		return &denial{err: ErrForbidden, why: "user " + ota.Quote(user)}
	}
	return nil
}

// Identify implements [Identifier].
func (a *Access) Identify(_ context.Context, peer *Peer) (user string, err error) {
	p := *peer
	p.Auth = nil
	return a.user(&p)
}

// user returns who the peer has shown to be, "" if nobody.
func (a *Access) user(peer *Peer) (string, error) {
	if auth := strings.TrimSpace(string(peer.Auth)); auth != "" && auth != "null" {
		return a.frameUser(peer)
	}
	if peer.admitted {
		return peer.User, nil
	}
	if peer.Request != nil {
		switch h := peer.Request.Header.Values("Authorization"); {
		case len(h) > 1:
			return "", a.challenge(peer, "more than one Authorization", false)
		case len(h) == 1:
			return a.headerUser(peer, h[0])
		}
	}
	if c := peer.certificate(); c != nil && a.o.CertUser != nil && time.Now().Before(c.NotAfter) {
		if u := a.o.CertUser(c); u != "" {
			return u, nil
		}
	}
	return peer.User, nil
}

// frameUser checks the member auth of a frame.
func (a *Access) frameUser(peer *Peer) (string, error) {
	if a.offered == nil {
		return "", a.challenge(peer, "no passwords here", false)
	}
	d, err := frameDigest(peer.Auth, DefaultMaxDepth)
	if err != nil || d.realm != a.o.Passwords.realm || !slices.Contains(a.offered, d.algorithm) {
		return "", errorf(400, "bad request")
	}
	issued, fresh := a.nonces.checkFrame(d.nonce, peer.key())
	return a.digestUser(peer, d, frameMethod, issued, fresh, 1)
}

// headerUser checks the header Authorization of a request.
func (a *Access) headerUser(peer *Peer, header string) (string, error) {
	scheme, token, params, err := parseAuth(header)
	switch {
	case err != nil:
	case scheme == "bearer":
		return a.tokenUser(peer, token)
	case scheme == "digest" && a.offered != nil:
		d, err := headerDigest(params)
		if err != nil || d.realm != a.o.Passwords.realm || !slices.Contains(a.offered, d.algorithm) || !sameTarget(peer, d.uri) {
			break
		}
		issued, fresh := a.nonces.checkHeader(d.nonce, peer.key())
		return a.digestUser(peer, d, peer.Request.Method, issued, fresh, d.count())
	}
	return "", a.challenge(peer, "unusable credentials", false)
}

// sameTarget reports whether uri, as digested, is what was requested. mos leaves
// escapes out.
func sameTarget(peer *Peer, uri string) bool {
	r := peer.Request
	return uri == r.RequestURI || uri == r.URL.RequestURI() || r.URL.RawQuery == "" && uri == r.URL.Path
}

// digestUser checks a digest whose nonce was issued by a to this peer if fresh.
func (a *Access) digestUser(peer *Peer, d *digest, method string, issued time.Duration, fresh bool, count uint64) (string, error) {
	ha1 := a.o.Passwords.users[d.user][d.algorithm]
	known := ha1 != ""
	if !known { // takes as long as if there was such a user
		m := hmac.New(sha256.New, a.decoy[:])
		m.Write([]byte(d.user))
		ha1 = hex.EncodeToString(m.Sum(nil))[:2*d.algorithm.new().Size()]
	}
	switch {
	case !d.proves(ha1, method) || !known:
		return "", a.challenge(peer, "wrong user or password", false)
	case !fresh:
		return "", a.challenge(peer, "the nonce is too old, or not for this peer", true)
	case !a.nonces.spend(d.nonce, issued, count):
		return "", a.challenge(peer, "the nonce was used already", true)
	}
	return d.user, nil
}

func (a *Access) tokenUser(peer *Peer, token string) (string, error) {
	if !a.o.AllowPlainTokens && !peer.private() {
		return "", a.challenge(peer, "a token that was readable on its way", false)
	}
	hash := HashToken(token)
	user := ""
	for _, t := range a.o.Tokens { // all of them, whichever it is
		if subtle.ConstantTimeCompare(hash[:], t.Hash[:]) == 1 {
			user = t.User
		}
	}
	if user == "" {
		return "", a.challenge(peer, "wrong token", false)
	}
	return user, nil
}

// challenge returns the refusal of a peer that has shown no valid credentials.
func (a *Access) challenge(peer *Peer, why string, stale bool) error {
	d := &denial{err: ErrUnauthenticated, why: why, stale: stale}
	for i, alg := range a.offered {
		realm := a.o.Passwords.realm
		if peer.Request != nil && !peer.admitted {
			// In the order of the original; mos takes the first, and needs the
			// algorithm to be the last member.
			s := fmt.Sprintf(`Digest qop="auth", realm=%s, nonce=%s`, quoted(realm), quoted(a.nonces.header(peer.key())))
			if stale {
				s += ", stale=true"
			}
			d.header = append(d.header, s+", algorithm="+string(alg))
		}
		if peer.Channel != "HTTP" && i == 0 {
			b := fmt.Appendf(nil, `{"auth_type": "digest", "nonce": %d, "nc": 1, "realm": `, a.nonces.frame(peer.key()))
			d.frame = string(appendString(b, realm)) + `, "algorithm": "` + string(alg) + `"}`
		}
	}
	if len(a.o.Tokens) > 0 {
		realm := "RPC"
		if a.o.Passwords != nil {
			realm = a.o.Passwords.realm
		}
		d.header = append(d.header, "Bearer realm="+quoted(realm))
	}
	return d
}

// certificate returns the verified certificate of the peer, nil if there is none.
func (p *Peer) certificate() *x509.Certificate {
	if s := p.tls(); s != nil && len(s.VerifiedChains) > 0 && len(s.VerifiedChains[0]) > 0 {
		return s.VerifiedChains[0][0]
	}
	return nil
}

func (p *Peer) tls() *tls.ConnectionState {
	if p.TLS == nil && p.Request != nil {
		return p.Request.TLS
	}
	return p.TLS
}

// private reports whether nobody else can read what the peer sends: over TLS, or
// inside of this device.
func (p *Peer) private() bool {
	if p.tls() != nil {
		return true
	}
	host, _, err := net.SplitHostPort(p.Addr)
	if err != nil {
		return p.Addr == "" || p.Addr[0] == '@' || p.Addr[0] == '/' // a Unix socket
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.Unmap().IsLoopback()
}

// MutualTLS returns the TLS configuration of a server that only talks to clients
// with a certificate by one of the authorities in pool, from TLS 1.2 on. To let
// clients without a certificate show a password or token instead, set ClientAuth to
// [tls.VerifyClientCertIfGiven]. The error wraps [ota.ErrInvalid].
func MutualTLS(cert tls.Certificate, pool *x509.CertPool) (*tls.Config, error) {
	if pool == nil || len(cert.Certificate) == 0 {
		return nil, fmt.Errorf("rpcjson: TLS: need a certificate, and a pool of authorities: %w", ota.ErrInvalid)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{cert},
		ClientCAs:    pool,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		MinVersion:   tls.VersionTLS12,
	}, nil
}

// CommonName returns the common name of a certificate's subject, for CertUser of
// [AccessOptions].
func CommonName(c *x509.Certificate) string { return c.Subject.CommonName }

// deny makes what is answered for the error of an Authorizer.
func deny(err error) *Error {
	var e *Error
	var d *denial
	switch {
	case errors.As(err, &d) && d.err == ErrUnauthenticated:
		e = errorf(401, "unauthenticated")
		if d.frame != "" {
			e.Message = d.frame
		}
		e.challenges = strings.Join(d.header, "\n")
		return e
	case errors.As(err, &e):
		e = errorf(e.Code, "%s", e.Message)
		if e.Code == 0 {
			e.Code = 403 // clients take 0 for success
		}
	case errors.Is(err, ErrUnauthenticated):
		e = errorf(401, "unauthenticated")
	case errors.Is(err, ErrForbidden):
		e = errorf(403, "unauthorized")
	default:
		e = errorf(500, "authorization failed")
	}
	var c interface{ WWWAuthenticate() string }
	if errors.As(err, &c) {
		e.challenges = c.WWWAuthenticate()
	}
	return e
}
