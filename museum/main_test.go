package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Every exhibit still applies to the sources as they are.
func TestCatalogueApplies(t *testing.T) {
	all, err := load(catalogue)
	require.NoError(t, err)
	require.Greater(t, len(all), 120)
	own := 0
	for _, x := range all {
		if strings.HasPrefix(x.source, "own") {
			own++
		}
		for _, c := range x.changes {
			b, err := os.ReadFile(filepath.Join("..", c.file))
			require.NoError(t, err, x.name)
			require.Equal(t, 1, strings.Count(string(b), c.old), "%s: %s", x.name, c.file)
			require.NotEqual(t, c.old, c.new, x.name)
		}
	}
	require.GreaterOrEqual(t, own, 20)
}

func TestParseRefuses(t *testing.T) {
	for _, bad := range []string{
		"text before the first exhibit",
		"== x\nstory: s\n",
		"== x\nstory: s\nsource: own\ntests: . T\n",
		"== x\nnonsense\n",
	} {
		_, err := parse(bad)
		require.Error(t, err, bad)
	}
	xs, err := parse("== x\nstory: s\nsource: own\ntests: ./p A|B\n--- f.go\nold\n+++\nnew\n")
	require.NoError(t, err)
	require.Equal(t, []change{{"f.go", "old", "new"}}, xs[0].changes)
	require.Equal(t, "./p", xs[0].pkg)
	require.Equal(t, "A|B", xs[0].tests)
}
