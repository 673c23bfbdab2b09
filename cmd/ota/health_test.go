package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestSelftestHealth(t *testing.T) {
	root := t.TempDir()
	for name, content := range map[string]string{
		"proc/cmdline": "panic=5 ota.slot=a", "proc/sys/kernel/panic": "5",
		"sys/class/watchdog/watchdog0/state": "active", "sys/class/watchdog/watchdog0/identity": "X",
	} {
		path := filepath.Join(root, filepath.FromSlash(name))
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
	}
	code, out, _ := tool(t, false, "selftest", "-health", "-root", root)
	require.Zero(t, code)
	require.Equal(t, "health: ok\n", out)
	require.NoError(t, os.WriteFile(filepath.Join(root, "proc", "sys", "kernel", "panic"), []byte("0"), 0o600))
	code, out, msg := tool(t, false, "selftest", "-health", "-root", root)
	require.Equal(t, exitFailed, code)
	require.Contains(t, out, "critical panic-halts: After a panic")
	require.Contains(t, out, "\n  remedy: Add panic=10")
	require.Contains(t, msg, "never be rolled back")
	require.NotContains(t, out, "environment-single")

	require.NoError(t, os.MkdirAll(filepath.Join(root, "etc"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(root, "etc", "fw_env.config"), []byte("/dev/mtd1 0 0x4000\n"), 0o600))
	_, out, _ = tool(t, false, "selftest", "-health", "-root", root)
	require.Contains(t, out, "environment-single: U-Boot keeps one copy")
}

// The findings of a device are printed, whatever is in them.
func TestStatusFindings(t *testing.T) {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		var f struct {
			ID     json.Number
			Method string
		}
		_ = json.Unmarshal(b, &f)
		res := map[string]string{
			"OTA.Status":       `{"state":0,"message":"idle","findings":[{"id":"a\u001b","severity":"critical","what":"W\u001b[2J","remedy":"R"}]}`,
			"OTA.GetBootState": `{"active_slot":1,"is_committed":true,"revert_slot":-1,"commit_timeout":0}`,
		}[f.Method]
		if res == "" {
			res = `{}`
		}
		_, _ = io.WriteString(w, `{"id":`+f.ID.String()+`,"result":`+res+`}`)
	}))
	defer web.Close()
	code, out, msg := tool(t, false, "status", "-device", web.URL)
	require.Zero(t, code, msg)
	require.Contains(t, out, `critical "a\x1b": "W\x1b[2J"`+"\n  remedy: R\n")
	code, out, _ = tool(t, false, "status", "-json", "-device", web.URL)
	require.Zero(t, code)
	require.Contains(t, out, `"remedy": "R"`)
}

func TestDetect(t *testing.T) {
	root := t.TempDir()
	code, _, _ := tool(t, false, "detect", "-root", root)
	require.Equal(t, exitNothing, code)
	require.NoError(t, os.MkdirAll(filepath.Join(root, "proc"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(root, "proc", "cmdline"), []byte("panic=1 bootchooser.active=a\x1b"), 0o600))
	code, out, _ := tool(t, false, "detect", "-root", root)
	require.Zero(t, code)
	require.Equal(t, "barebox: certain\n  The kernel's command line has bootchooser.active=\"a\\x1b\", which its bootchooser adds.\n"+
		"kernel    \"bootchooser.active=a\\x1b\"\n", out)
	code, out, _ = tool(t, false, "detect", "-json", "-root", root)
	require.Zero(t, code)
	require.Contains(t, out, `"confidence": "certain"`)
}
