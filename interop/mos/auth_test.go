package mos_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/rpcjson"
)

// creds sets the client's flag --rpc-creds until the test ends.
func creds(t *testing.T, value string) {
	t.Helper()
	require.NoError(t, pflag.CommandLine.Parse([]string{"--rpc-creds=" + value}))
	t.Cleanup(func() { require.NoError(t, pflag.CommandLine.Parse([]string{"--rpc-creds="})) })
}

// access returns who may do what on a device with users admin and reader, the
// passwords of both being secret.
func access(t *testing.T, a rpcjson.Algorithm) *rpcjson.Access {
	t.Helper()
	var lines []string
	for _, user := range []string{"admin", "reader"} {
		line, err := rpcjson.HashPassword(a, user, "RPC", "secret")
		require.NoError(t, err)
		lines = append(lines, line)
	}
	p, err := rpcjson.ParsePasswords(strings.NewReader(strings.Join(lines, "\n")), "RPC")
	require.NoError(t, err)
	acc, err := rpcjson.NewAccess(rpcjson.AccessOptions{
		Passwords: p,
		Rights:    map[string][]rpcjson.Right{"admin": {rpcjson.Read, rpcjson.Operate, rpcjson.Install}, "reader": {rpcjson.Read}},
	})
	require.NoError(t, err)
	return acc
}

// The client logs in with digest over HTTP, by both algorithms, pushes a whole
// firmware and commits it, and is refused as it expects without the right password
// or right.
func TestAuth(t *testing.T) {
	for _, a := range []rpcjson.Algorithm{rpcjson.MD5, rpcjson.SHA256} {
		t.Run(string(a), func(t *testing.T) {
			d := newRig(t, rigOptions{auth: access(t, a)})
			refused := func(method, params, want string) {
				t.Helper()
				_, err := d.call(method, params)
				require.ErrorContains(t, err, want)
			}
			refused("OTA.Status", "", "credentials required but none provided")
			creds(t, "admin:wrong")
			refused("OTA.Status", "", "authentication failed")
			creds(t, "nobody:secret")
			refused("OTA.Status", "", "authentication failed")
			creds(t, "reader:secret")
			require.Equal(t, committed0, d.must("OTA.GetBootState", ""))
			d.refused("OTA.Commit", "", "remote error 403: unauthorized")
			d.refused("OTA.Begin", "{}", "remote error 403: unauthorized")
			require.Error(t, d.push(recorded(t, "small.zip")))
			require.Equal(t, 1, d.bootCount())
			d.requireFactory()

			file := filepath.Join(t.TempDir(), "creds")
			require.NoError(t, os.WriteFile(file, []byte("admin:secret\n"), 0o600))
			creds(t, "@"+file)
			require.NoError(t, d.push(recorded(t, "small.zip")))
			h := d.afterBoot(2)
			require.EqualValues(t, 1, h.Slot)
			require.Equal(t, "null", d.must("OTA.Commit", ""))
			require.Equal(t, committed1, d.must("OTA.GetBootState", ""))
		})
	}
}
