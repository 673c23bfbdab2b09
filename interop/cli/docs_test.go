package cli_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The commands in the documentation do what it says: every block "console" is run, in
// one directory, and prints what stands below each command, where … stands for the
// rest of a line, or for all of it, and [exit N] for the exit code if it is not 0.
func TestDocs(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("the commands are for a POSIX shell")
	}
	if _, err := exec.LookPath("openssl"); err != nil {
		require.NotEqual(t, "true", os.Getenv("CI"), "install the Debian package openssl")
		t.Skip("install the Debian package openssl")
	}
	doc, err := os.ReadFile("../../docs/SIGNING.md")
	require.NoError(t, err)
	bin, dir := t.TempDir(), t.TempDir()
	out, err := exec.Command("go", "build", "-o", filepath.Join(bin, "ota"), "github.com/slotota/ota/cmd/ota").CombinedOutput()
	require.NoError(t, err, "%s", out)

	commands := 0
	for _, block := range regexp.MustCompile("(?s)```console\n(.*?)```").FindAllStringSubmatch(string(doc), -1) {
		for _, step := range strings.Split("\n"+block[1], "\n$ ")[1:] {
			command, want, _ := strings.Cut(step, "\n")
			cmd := exec.CommandContext(t.Context(), "sh", "-c", command)
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "PATH="+bin+string(filepath.ListSeparator)+os.Getenv("PATH"), "NO_COLOR=1")
			got, err := cmd.CombinedOutput()
			text := strings.TrimRight(string(got), "\n")
			if exit, ok := err.(*exec.ExitError); ok {
				text += fmt.Sprintf("\n[exit %d]", exit.ExitCode())
			} else {
				require.NoError(t, err)
			}
			pattern := strings.ReplaceAll(regexp.QuoteMeta(strings.TrimRight(want, "\n")), "…", "[^\n]*")
			if strings.TrimSpace(want) == "…" {
				pattern = "(?s:.+)"
			}
			require.Regexp(t, "^"+pattern+"$", text, "$ %s", command)
			commands++
		}
	}
	require.Greater(t, commands, 30)
}
