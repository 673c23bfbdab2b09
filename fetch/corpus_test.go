package fetch

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

// urlCase is a row of testdata/hostile/urls.json. Without via, URL is asked for
// directly; else it is where the last of via redirects to.
type urlCase struct {
	URL   string   `json:"url"`
	Via   []string `json:"via"`
	Times int      `json:"times"` // how often via is repeated, if not once
	Allow []string `json:"allow"` // http, loopback, private, or a network
	Hosts []string `json:"hosts"`
	Max   int      `json:"max"`
	Error string   `json:"error"` // names of sentinels, all of which the error is; "" = accepted
}

func (c *urlCase) policy(t testing.TB) *Policy {
	p := &Policy{Hosts: c.Hosts, MaxRedirects: c.Max}
	for _, a := range c.Allow {
		switch a {
		case "http":
			p.AllowHTTP = true
		case "loopback":
			p.AllowLoopback = true
		case "private":
			p.AllowPrivate = true
		default:
			n, err := netip.ParsePrefix(a)
			require.NoError(t, err)
			p.AllowAddrs = append(p.AllowAddrs, n)
		}
	}
	return p
}

func urlCases(t testing.TB) (cases []urlCase) {
	b, err := os.ReadFile("testdata/hostile/urls.json")
	require.NoError(t, err)
	d := json.NewDecoder(strings.NewReader(string(b)))
	d.DisallowUnknownFields()
	require.NoError(t, d.Decode(&cases))
	return cases
}

var sentinels = map[string]error{"ErrURL": ErrURL, "ErrPolicy": ErrPolicy, "ErrAddress": ErrAddress, "ErrRedirect": ErrRedirect}

func TestURLCorpus(t *testing.T) {
	cases := urlCases(t)
	require.GreaterOrEqual(t, len(cases), 380)
	refused := 0
	for _, c := range cases {
		p := c.policy(t)
		err := func() error {
			if len(c.Via) == 0 {
				_, err := p.ParseURL(c.URL)
				return err
			}
			u, err := url.Parse(c.URL)
			require.NoError(t, err)
			var via []*http.Request
			for range max(1, c.Times) {
				for _, v := range c.Via {
					u, err := url.Parse(v)
					require.NoError(t, err)
					via = append(via, &http.Request{URL: u})
				}
			}
			return p.CheckRedirect(&http.Request{URL: u, Header: http.Header{}}, via)
		}()
		if c.Error == "" {
			require.NoError(t, err, "%+v", c)
			continue
		}
		refused++
		require.Error(t, err, "%+v", c)
		var e *Error
		require.ErrorAs(t, err, &e)
		want := strings.Fields(c.Error)
		for name, is := range sentinels {
			require.Equal(t, slices.Contains(want, name), errors.Is(err, is), "%+v: %v", c, err)
		}
		checkText(t, err, c.URL)
	}
	require.GreaterOrEqual(t, refused, 300)
}

// checkText requires that an error is fit for a log and for an answer.
func checkText(t testing.TB, err error, rawURL string) {
	t.Helper()
	text := err.Error()
	require.Less(t, len(text), 700)
	require.False(t, strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' && r != '…' }), "%q", text)
	if u, perr := url.Parse(rawURL); perr == nil && u.User != nil {
		if pw, _ := u.User.Password(); len(pw) > 4 {
			require.NotContains(t, text, pw)
		}
	}
}

func TestCheckAddr(t *testing.T) {
	var p *Policy
	require.NoError(t, p.CheckAddr(netip.MustParseAddr("8.8.8.8")))
	require.NoError(t, p.CheckAddr(netip.MustParseAddr("::ffff:8.8.8.8")), "dialled, it is the IPv4 address")
	for _, a := range []string{"127.0.0.1", "::ffff:127.0.0.1", "::1", "10.0.0.1", "fe80::1%eth0", "0.0.0.0", "::"} {
		err := p.CheckAddr(netip.MustParseAddr(a))
		require.ErrorIs(t, err, ErrAddress, a)
		require.NotErrorIs(t, err, ota.ErrInvalid)
	}
	require.ErrorIs(t, p.CheckAddr(netip.Addr{}), ErrAddress)
	require.EqualError(t, p.CheckAddr(netip.MustParseAddr("10.0.0.1")), "fetch: address not allowed: 10.0.0.1 is private")
	// Every network of the table is well-formed, and its first address refused.
	for _, s := range special {
		for n := range strings.FieldsSeq(s.nets) {
			require.ErrorIs(t, p.CheckAddr(netip.MustParsePrefix(n).Addr()), ErrAddress, n)
		}
	}
}

// What is accepted asks for nothing but a public address or a name over https.
func FuzzURL(f *testing.F) {
	for _, c := range urlCases(f) {
		f.Add(c.URL, false)
		f.Add(c.URL, true)
	}
	f.Fuzz(func(t *testing.T, raw string, listed bool) {
		p := &Policy{}
		if listed {
			p.Hosts = []string{"updates.example.com:443"}
		}
		u, err := p.ParseURL(raw)
		if err != nil {
			var e *Error
			require.ErrorAs(t, err, &e)
			checkText(t, err, raw)
			return
		}
		require.Equal(t, "https", u.Scheme)
		require.NotEmpty(t, u.Hostname())
		if listed {
			require.Equal(t, "updates.example.com", strings.TrimSuffix(strings.ToLower(u.Hostname()), "."))
			require.Contains(t, []string{"", "443"}, u.Port())
		}
		if a, err := netip.ParseAddr(u.Hostname()); err == nil {
			require.False(t, a.IsLoopback() || a.IsPrivate() || a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsUnspecified() || a.Is4In6())
		}
		// Parsed again from its text it is the same.
		again, err := p.ParseURL(u.String())
		require.NoError(t, err)
		require.Equal(t, u.Host, again.Host)
		// The transport gets the host in the same form.
		r, err := http.NewRequest(http.MethodGet, u.String(), nil)
		require.NoError(t, err)
		require.Equal(t, u.Host, r.URL.Host)
	})
}
