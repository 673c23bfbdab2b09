package fetch

import (
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
)

// Credentials in a header do not travel to another port of the same host, which
// net/http takes for the same place.
func TestCredentialsInHeaders(t *testing.T) {
	var got http.Header
	b := serve(t, 1, func(w http.ResponseWriter, r *http.Request) { got = r.Header; hello(w, r) })
	a := serve(t, 3, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/away":
			http.Redirect(w, r, b.URL+"/fw.zip", http.StatusFound)
		case "/here":
			http.Redirect(w, r, "/fw.zip", http.StatusFound)
		default:
			got = r.Header
			hello(w, r)
		}
	})
	c := (&Policy{AllowHTTP: true, AllowLoopback: true}).Client()
	defer c.CloseIdleConnections()
	secrets := []string{"Authorization", "Cookie", "Proxy-Authorization"}
	for path, kept := range map[string]bool{"/here": true, "/away": false} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, a.URL+path, nil)
		require.NoError(t, err)
		for _, h := range secrets {
			r.Header.Set(h, "hidden")
		}
		res, err := Do(c, r)
		require.NoError(t, err)
		require.NoError(t, res.Body.Close())
		for _, h := range secrets {
			require.Equal(t, kept, got.Get(h) != "", "%s after %s", h, path)
		}
	}
}
