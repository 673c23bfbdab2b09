package rpcjson

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

// Findings come when asked for; clients that do not know of them see nothing.
func TestFindings(t *testing.T) {
	d := newFake()
	d.findings = []ota.Finding{{ID: "x", Severity: ota.Critical, What: "W.", Remedy: "R."}}
	s := newTest(t, d, nil)
	for _, params := range []string{"", `{}`, `{"findings":false}`, `{"findings":1}`, `[true]`} {
		require.NotContains(t, do(t, s, "OTA.Status", params), "findings", params)
	}
	require.Contains(t, do(t, s, "OTA.Status", `{"findings":true}`),
		`, "findings": [{"id":"x","severity":"critical","what":"W.","remedy":"R."}]}`)
}
