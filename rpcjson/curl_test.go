package rpcjson_test

import (
	"bytes"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/rpcjson"
)

// curl logs in by digest with both algorithms, calls methods, and uploads a whole
// firmware to a real device.
func TestCurl(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("curl is missing: install the Debian package curl")
		}
		t.Skip("curl is missing: install the Debian package curl")
	}
	for _, a := range []rpcjson.Algorithm{rpcjson.MD5, rpcjson.SHA256} {
		t.Run(string(a), func(t *testing.T) {
			line, err := rpcjson.HashPassword(a, "admin", "RPC", `se"cret`)
			require.NoError(t, err)
			p, err := rpcjson.ParsePasswords(strings.NewReader(line), "RPC")
			require.NoError(t, err)
			access, err := rpcjson.NewAccess(rpcjson.AccessOptions{Passwords: p})
			require.NoError(t, err)
			b := newBoardFor(t, access)
			mux := http.NewServeMux()
			mux.Handle("/rpc/", b.srv)
			mux.Handle("/update", b.srv.UpdateHandler())
			mux.Handle("/update/", b.srv.UpdateHandler())
			l, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			web := rpcjson.NewHTTPServer(mux)
			ended := make(chan error, 1)
			go func() { ended <- web.Serve(rpcjson.LimitListener(l, 10)) }()
			defer func() {
				require.NoError(t, web.Close())
				require.ErrorIs(t, <-ended, http.ErrServerClosed)
			}()
			run := func(args ...string) string {
				t.Helper()
				cmd := exec.CommandContext(t.Context(), curl, append([]string{"-q", "-sS", "--noproxy", "*", "-m", "20", "-w", "%{http_code}"}, args...)...)
				var errs bytes.Buffer
				cmd.Stderr = &errs
				out, err := cmd.Output()
				require.NoError(t, err, "%s", errs.String())
				return string(out)
			}
			url := "http://" + l.Addr().String()
			good := []string{"--digest", "-u", `admin:se"cret`}
			status := url + "/rpc/OTA.Status"
			require.Equal(t, "401", run(status))
			require.Equal(t, "401", run("--digest", "-u", "admin:wrong", status))
			require.Equal(t, "401", run("-u", `admin:se"cret`, status), "basic")
			got := run(append(good, status, status, status)...) // one nonce, three counts
			require.Equal(t, 3, strings.Count(got, `"message": "idle"`), "%s", got)
			require.Equal(t, 3, strings.Count(got, "\r\n200"), "%s", got)
			require.Contains(t, run(append(good, url+"/rpc/RPC.Describe?name=%22OTA.Write%22")...), `"name": "OTA.Write"`)
			require.Contains(t, run(append(good, "--json", `{"active_slot":7}`, url+"/rpc/OTA.SetBootState")...), `"reason":"unknown-slot"`)

			require.Equal(t, "401", run("-F", "file=@testdata/small.zip", url+"/update"))
			bad := filepath.Join(t.TempDir(), "bad.zip")
			require.NoError(t, os.WriteFile(bad, bytes.Repeat([]byte("not a bundle"), 1<<18), 0o600))
			got = run(append(good, "-F", "file=@"+bad, url+"/update")...)
			require.Contains(t, got, "-1 ")
			require.Contains(t, got, "\r\n500")
			b.untouched()
			require.Equal(t, "Error\r\n400", run(append(good, "-X", "POST", url+"/update/commit")...))
			got = run(append(good, "-F", "commit_timeout=300", "-F", "filedata=@testdata/small.zip", url+"/update")...)
			require.Equal(t, "1 Update applied, rebooting\r\n200", got)
			<-b.resets
			s, err := b.boot.Load(t.Context())
			require.NoError(t, err)
			require.EqualValues(t, 1, s.Active)
			require.False(t, s.Committed)
		})
	}
}
