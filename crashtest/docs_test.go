package crashtest

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The code in CONTRIBUTING.md is that of the examples, which run.
func TestContributing(t *testing.T) {
	doc, err := os.ReadFile("../CONTRIBUTING.md")
	require.NoError(t, err)
	lines := map[string]bool{}
	for _, name := range []string{"../flashtest/example_test.go", "../boottest/example_test.go"} {
		b, err := os.ReadFile(name)
		require.NoError(t, err)
		for line := range strings.Lines(string(b)) {
			lines[strings.TrimRight(line, "\r\n")] = true
		}
	}
	inside, n := false, 0
	for line := range strings.Lines(string(doc)) {
		line = strings.TrimRight(line, "\r\n")
		switch {
		case strings.HasPrefix(line, "```"):
			inside = line == "```go"
		case inside:
			require.True(t, lines[line], "no example has the line %q", line)
			n++
		}
	}
	require.Greater(t, n, 50)
}
