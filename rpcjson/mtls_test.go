package rpcjson_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/ws"
)

// authority signs certificates.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB, name string) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(48 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return &authority{t, cert, key}
}

// issue returns a certificate for name that is valid until then, for a server at
// 127.0.0.1 or for a client.
func (a *authority) issue(name string, until time.Time, usage x509.ExtKeyUsage) tls.Certificate {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(a.t, err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: until, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}, a.cert, &key.PublicKey, a.key)
	require.NoError(a.t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// Over https, wss and TCP with TLS, with real handshakes: a certificate by the right
// authority gives its user's rights, and all others get nowhere.
func TestMutualTLS(t *testing.T) {
	ca, foreign := newAuthority(t, "fleet"), newAuthority(t, "fleet")
	later := time.Now().Add(time.Hour)
	clients := map[string]*tls.Certificate{"none": nil}
	for name, c := range map[string]tls.Certificate{
		"reader":    ca.issue("reader", later, x509.ExtKeyUsageClientAuth),
		"installer": ca.issue("installer", later, x509.ExtKeyUsageClientAuth),
		"stranger":  ca.issue("stranger", later, x509.ExtKeyUsageClientAuth),
		"expired":   ca.issue("installer", time.Now().Add(-time.Hour), x509.ExtKeyUsageClientAuth),
		"foreign":   foreign.issue("installer", later, x509.ExtKeyUsageClientAuth),
		"server":    ca.issue("installer", later, x509.ExtKeyUsageServerAuth),
	} {
		clients[name] = &c
	}
	access, err := rpcjson.NewAccess(rpcjson.AccessOptions{CertUser: rpcjson.CommonName, Rights: map[string][]rpcjson.Right{
		"reader": {rpcjson.Read}, "installer": {rpcjson.Read, rpcjson.Operate, rpcjson.Install},
	}})
	require.NoError(t, err)
	const ok, no = "ok", "no handshake"
	for _, optional := range []bool{false, true} {
		b := newBoardFor(t, access)
		conf, err := rpcjson.MutualTLS(ca.issue("device", later, x509.ExtKeyUsageServerAuth), ca.pool())
		require.NoError(t, err)
		none := no
		if optional {
			conf.ClientAuth, none = tls.VerifyClientCertIfGiven, "401"
		}
		web, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		h := ws.NewHandler(b.srv, nil)
		hs := rpcjson.NewHTTPServer(h)
		hs.TLSConfig, hs.ErrorLog = conf, log.New(io.Discard, "", 0)
		webEnded := make(chan error, 1)
		go func() { webEnded <- hs.ServeTLS(web, "", "") }()
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		tcpEnded := make(chan error, 1)
		go func() { tcpEnded <- b.srv.ServeListener(ctx, tls.NewListener(l, conf), nil) }()

		for name, want := range map[string][2]string{ // OTA.GetBootState, OTA.Begin
			"reader": {ok, "403"}, "installer": {ok, ok}, "stranger": {"403", "403"},
			"expired": {no, no}, "foreign": {no, no}, "server": {no, no}, "none": {none, none},
		} {
			mine := &tls.Config{RootCAs: ca.pool()}
			if c := clients[name]; c != nil {
				mine.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c, nil }
			}
			overHTTP, err := rpcjson.Dial(ctx, "https://"+web.Addr().String(), &rpcjson.ClientOptions{
				HTTPClient: &http.Client{Transport: &http.Transport{TLSClientConfig: mine}},
			})
			require.NoError(t, err)
			overTCP := rpcjson.NewClient(rpcjson.NewStream(func(ctx context.Context) (io.ReadWriteCloser, error) {
				return (&tls.Dialer{Config: mine}).DialContext(ctx, "tcp", l.Addr().String())
			}, nil), nil)
			ch, err := ws.Dial(ctx, "wss://"+web.Addr().String(), &ws.DialOptions{TLS: mine})
			require.NoError(t, err)
			for transport, c := range map[string]*rpcjson.Client{"https": overHTTP, "tcp": overTCP, "wss": rpcjson.NewClient(ch, nil)} {
				for i, method := range []string{"OTA.GetBootState", "OTA.Begin"} {
					got := ok
					if err := c.Call(ctx, method, nil, nil); err != nil {
						got = no
						if e, ok := err.(*rpcjson.Error); ok {
							got = fmt.Sprint(e.Code)
						} else {
							require.ErrorIs(t, err, rpcjson.ErrNoReply)
						}
					}
					require.Equal(t, want[i], got, "%s %s %s, optional %v", transport, name, method, optional)
					if got == ok && method == "OTA.Begin" {
						require.ErrorContains(t, c.Call(ctx, "OTA.End", nil, nil), "Unexpected end of data")
					}
				}
				_ = c.Close() // of what the device has closed already
			}
		}
		require.NoError(t, h.Close())
		cancel()
		require.ErrorIs(t, <-tcpEnded, context.Canceled)
		require.NoError(t, hs.Close())
		require.ErrorIs(t, <-webEnded, http.ErrServerClosed)
	}
}

// A client that connects and says nothing does not keep a server from ending.
func TestTLSWithoutHandshake(t *testing.T) {
	ca := newAuthority(t, "fleet")
	conf, err := rpcjson.MutualTLS(ca.issue("device", time.Now().Add(time.Hour), x509.ExtKeyUsageServerAuth), ca.pool())
	require.NoError(t, err)
	b := newBoard(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	asked := make(chan struct{})
	conf.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		close(asked)
		return nil, nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- b.srv.ServeListener(ctx, tls.NewListener(l, conf), nil) }()
	c, err := net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	defer c.Close()
	// A hello, and then nothing.
	hello := make(chan []byte, 1)
	mine, theirs := net.Pipe()
	go func() {
		buf := make([]byte, 4096)
		n, _ := theirs.Read(buf)
		hello <- buf[:n]
		theirs.Close()
	}()
	require.Error(t, tls.Client(mine, &tls.Config{ServerName: "x"}).HandshakeContext(ctx))
	_, err = c.Write(<-hello)
	require.NoError(t, err)
	<-asked
	cancel()
	require.ErrorIs(t, <-ended, context.Canceled)
}
