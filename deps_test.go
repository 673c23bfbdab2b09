package ota_test

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// What an importer compiles beside the standard library, package by package.
// Everything not listed may import the library itself only.
func TestImports(t *testing.T) {
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("needs the go command in PATH")
	}
	const self = "github.com/slotota/ota"
	allowed := map[string][]string{
		self + "/bundle/trust":   {"golang.org/x/mod/sumdb/note"},
		self + "/flash/mtdflash": {"golang.org/x/sys/unix"},
		self + "/flash/ubiflash": {"golang.org/x/sys/unix"},
		self + "/watchdog":       {"golang.org/x/sys/unix"},
		self + "/rpcjson/serial": {"go.bug.st/serial"},
		self + "/cmd/ota":        {"github.com/klauspost/compress/zstd"},
		self + "/bundle":         {"github.com/klauspost/compress/zstd", "golang.org/x/mod/sumdb/note"},
		self + "/rpcjson/ws":     {"github.com/coder/websocket"},
		self + "/rpcjson/mqtt":   {"github.com/eclipse/paho.mqtt.golang"},
		self + "/boot/efi":       {"golang.org/x/sys"},
		// Only tests import it.
		self + "/internal/replay": {"github.com/stretchr/testify/require"},
	}
	out, err := exec.Command("go", "list", "-deps", "-f",
		`{{if not .Standard}}{{.ImportPath}}{{range .Imports}} {{.}}{{end}}{{end}}`, "./...").Output()
	require.NoError(t, err)
	seen := 0
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != self && !strings.HasPrefix(f[0], self+"/") {
			continue
		}
		seen++
		for _, imp := range f[1:] {
			if !strings.Contains(strings.Split(imp, "/")[0], ".") || strings.HasPrefix(imp+"/", self+"/") {
				continue
			}
			require.True(t, slices.ContainsFunc(allowed[f[0]], func(m string) bool { return strings.HasPrefix(imp+"/", m+"/") }),
				"%s imports %s", f[0], imp)
		}
		if f[0] == self {
			for _, imp := range f[1:] {
				require.False(t, strings.HasPrefix(imp, self), "the root package imports %s", imp)
				require.NotEqual(t, "testing", imp)
			}
		}
	}
	require.Greater(t, seen, 5)
}
