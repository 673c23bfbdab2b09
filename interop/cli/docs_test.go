package cli_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
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
	bin := t.TempDir()
	out, err := exec.Command("go", "build", "-o", filepath.Join(bin, "ota"), "github.com/slotota/ota/cmd/ota").CombinedOutput()
	require.NoError(t, err, "%s", out)
	for name, c := range map[string]struct {
		tool string // needed beside those of POSIX
		min  int    // commands
	}{
		"SIGNING.md":     {"openssl", 30},
		"WALKTHROUGH.md": {"", 20},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := exec.LookPath(c.tool); err != nil && c.tool != "" {
				require.NotEqual(t, "true", os.Getenv("CI"), "install the Debian package %s", c.tool)
				t.Skipf("install the Debian package %s", c.tool)
			}
			require.GreaterOrEqual(t, runDoc(t, bin, name), c.min)
		})
	}
}

// runDoc runs the commands of a page, and returns how many there are. What a command
// leaves running has its process id in a file *.pid.
func runDoc(t *testing.T, bin, name string) (commands int) {
	doc, err := os.ReadFile(filepath.Join("../../docs", name))
	require.NoError(t, err)
	dir, err := os.MkdirTemp("", "ota") // the paths of tests may be too long for a socket
	require.NoError(t, err)
	t.Cleanup(func() {
		pids, _ := filepath.Glob(filepath.Join(dir, "*.pid"))
		for _, file := range pids {
			text, _ := os.ReadFile(file)
			pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
			if err != nil || !t.Failed() { // the page ends them itself
				continue
			}
			if p, err := os.FindProcess(pid); err == nil {
				_ = p.Kill()
			}
		}
		os.RemoveAll(dir)
	})
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
	return commands
}
