package ws

import (
	"crypto/tls"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/internal/authmatrix"
	"github.com/slotota/ota/rpcjson"
)

// Who may call what, by the credentials of the handshake and of each frame.
func TestMatrix(t *testing.T) {
	for _, secure := range []bool{false, true} {
		tr := authmatrix.Transport{Name: "WebSocket", Channel: "WS_in", Headers: true, Certs: secure}
		if secure {
			tr.Name = "WebSocket over TLS"
		}
		tr.Frames = func(t *testing.T, srv *rpcjson.Server, pki *authmatrix.PKI) func(authmatrix.Opening) (authmatrix.RoundTrip, error) {
			h := NewHandler(srv, &Options{MaxConns: 1 << 10})
			web := httptest.NewUnstartedServer(h)
			web.Config.ErrorLog = log.New(io.Discard, "", 0) // handshakes that fail
			if secure {
				web.TLS = &tls.Config{ClientCAs: pki.Pool, ClientAuth: tls.VerifyClientCertIfGiven}
				web.StartTLS()
			} else {
				web.Start()
			}
			t.Cleanup(func() {
				require.NoError(t, h.Close())
				web.Close()
			})
			return func(o authmatrix.Opening) (authmatrix.RoundTrip, error) {
				tr := web.Client().Transport.(*http.Transport).Clone()
				if o.Cert != nil {
					tr.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return o.Cert, nil }
				}
				t.Cleanup(tr.CloseIdleConnections)
				header := http.Header{}
				if o.Header != "" {
					header.Set("Authorization", o.Header)
				}
				c, res, err := websocket.Dial(t.Context(), wsURL(web.URL)+"/rpc", &websocket.DialOptions{HTTPHeader: header, HTTPClient: &http.Client{Transport: tr}})
				if err != nil && res != nil {
					return nil, &authmatrix.Refused{Status: res.StatusCode, Challenges: res.Header.Values("WWW-Authenticate")}
				}
				if err != nil {
					return nil, err
				}
				t.Cleanup(func() { _ = c.CloseNow() })
				return func(frame []byte) ([]byte, error) {
					if err := c.Write(t.Context(), websocket.MessageText, frame); err != nil {
						return nil, err
					}
					_, b, err := c.Read(t.Context())
					return b, err
				}, nil
			}
		}
		authmatrix.Run(t, tr)
	}
}
