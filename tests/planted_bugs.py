"""Does the suite catch bugs? Plants one-line bugs in the kernels, one by one, and runs the tests that must fail.

    python tests/planted_bugs.py                  all of them, some minutes
    python tests/planted_bugs.py sink "tail"      those whose name contains one of these words

It works on a copy of the tree in a temporary folder, with only the baseline kernels and little optimisation. First the
tests run without bugs: they must pass. Then each bug is planted, the kernels are built, its tests run until the first
failure, and the line is restored. What only makes the kernels slower changes no result: there instructions are counted,
if valgrind is installed. The exit status is 0 if every bug was found. pytest does not collect this file; run it by hand
after changing kernels or tests.
"""

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COUNTS = "benchmarks/instructions.py"
PARTS = ("fastattn", "tests", "setup.py", "pyproject.toml", "README.md", COUNTS, COUNTS[:-2] + "c")
# Settings of the copy's build: only the kernels of baseline_*.c, so that it is quick.
SETTINGS = (
    ("setup.py", '"-O2"', '"-O1"'),
    ("fastattn/kernels/select.c", "defined(__x86_64__)", "0"),
    ("fastattn/kernels/select.c", "defined(__aarch64__)", "0"),
)
KERNELS = os.listdir(f"{ROOT}/fastattn/kernels")
OTHER_KERNELS = [name for name in KERNELS if re.fullmatch(r"(?!baseline).*_f..\.c", name)]


@dataclasses.dataclass
class Bug:
    """A text that occurs once in a kernel file, `right`, and its replacement."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str  # arguments of pytest; the first failure is enough. Or COUNTS


BUGS = (
    Bug(
        "blocks of 8 bits share the first scale",
        "scales.inc.h",
        "read_number(row + block * scales->col, scales->dtype);",
        "read_number(row, scales->dtype);",
        "test_int8.py -k test_forms_of_scales",
    ),
    Bug(
        "a hidden value's scale of NaN comes through",
        "scales.inc.h",
        "x = v_pick_bits(bits_at(&visible->bits[r], j, LANES), x, (vec){0});",
        "v_pick_bits(bits_at(&visible->bits[r], j, LANES), x, (vec){0});",
        "test_int8.py -k test_scales_of_hidden_keys",
    ),
    Bug(
        "the log-sum-exp forgets the centre of keys",
        "state.inc.h",
        "!adds_center(problem) ? tile->center[r] : 0);",
        "!adds_center(problem) ? 0 * tile->center[r] : 0);",
        "test_int8.py -k test_forms_of_scales",
    ),
    Bug(
        "a soft cap sees keys without their centre",
        "scales.inc.h",
        "(problem->softcap != 0 || problem->activation == FA_RELU",
        "(problem->activation == FA_RELU",
        "test_int8.py -k test_rules",
    ),
    Bug(
        "a gate is added",
        "dense.inc.h",
        "y *= v_load(m + v * LANES);",
        "y += v_load(m + v * LANES);",
        "test_layers.py -k test_product",
    ),
    Bug(
        "few rows lose every second channel",
        "dense.inc.h",
        "sum[0][r][v] + sum[1][r][v] :",
        "sum[0][r][v] :",
        "test_layers.py -k test_product",
    ),
    Bug(
        "four rows lose every second channel",
        "dense.inc.h",
        "v_load(e) + sum[0][r][v];",
        "sum[0][r][v];",
        "test_layers.py -k test_product",
    ),
    Bug(
        "scales count twice",
        "dense.inc.h",
        "y *= v_load(scale + v * LANES);",
        "y *= v_load(scale + v * LANES) * 2;",
        "test_layers.py -k test_product_of_int8",
    ),
    Bug(
        "deep products keep only their last part",
        "dense.inc.h",
        "depth, to, c > 0, ahead, lines);",
        "depth, to, 0, ahead, lines);",
        "test_layers.py -k test_product",
    ),
    Bug(
        "silu of -inf is NaN",
        "activation.inc.h",
        "return times_sigmoid(y, y);",
        "return times_sigmoid(x, x);",
        "test_layers.py -k infinity",
    ),
    Bug(
        "denormal rows have no deviation",
        "norm.inc.h",
        "if (norm->eps > 0 && exponent < -500)",
        "if (exponent < -500)",
        "test_layers.py -k any_size",
    ),
    Bug(
        "the offset of a norm is lost",
        "norm.inc.h",
        "y *= load_up_to(weight + i, rest) + offset;",
        "y *= load_up_to(weight + i, rest);",
        "test_layers.py -k test_norms",
    ),
    Bug(
        "scales of 8 bits are not rounded before they divide",
        "quantize.inc.h",
        "scale = from_bf16(to_bf16(scale));",
        "return scale;",
        "test_quantized.py -k test_against_the_reference",
    ),
    Bug(
        "a coarse scale of 8 bits does not reach its largest number",
        "quantize.inc.h",
        "if (127.5f * scale < top)",
        "if (0)",
        "test_quantized.py -k 'bounds or every_size'",
    ),
    Bug(
        "numbers of 8 bits pass their center",
        "quantize.inc.h",
        "x[c] -= rows->center[c];",
        "x[c] += rows->center[c];",
        "test_quantized.py -k centered",
    ),
    Bug(
        "infinities become 8 bits",
        "quantize.inc.h",
        "v_true_bits(check != check) || ",
        "",
        "test_quantized.py -k escapes",
    ),
    Bug(
        "prepared keys are never wide",
        "additive.inc.h",
        "memcpy(to, &tile->additive.wide_keys, sizeof tile->additive.wide_keys);",
        "memset(to, 0, sizeof tile->additive.wide_keys);",
        "test_prepared_keys.py -k wide",
    ),
    Bug(
        "wide queries find no prepared keys",
        "additive.inc.h",
        "if (bits_any(&additive->wide_keys) || memchr(additive->row_is_wide, 1, (size_t)rows))",
        "if (bits_any(&additive->wide_keys))",
        "test_prepared_keys.py -k wide",
    ),
    Bug(
        "from C: scores of strided weights are kept side by side",
        "weights.inc.h",
        "memcpy(w + j * col, from + j, sizeof(real));",
        "memcpy(w + j * (ptrdiff_t)sizeof(real), from + j, sizeof(real));",
        "test_embedding.py -k test_bits_of_every_layout",
    ),
    Bug(
        "strides of arrays that are not there are multiplied",
        "embed.c",
        "*a->view = (fastattn_view){.data = a->view->data ? nothing : NULL};",
        "a->view->data = a->view->data ? nothing : NULL;",
        "test_embed_sanitized.py -k structs",
    ),
    Bug(
        "a query is read as if it were aligned",
        "dot.inc.h",
        "memcpy(&x, from + k, sizeof x); /* may lie at any address */",
        "x = from[k];",
        "test_embed_sanitized.py -k structs",
    ),
    Bug(
        "threads of a call share one workspace",
        "drive.c",
        "plan->workspaces + (size_t)thread * plan->workspace_size, watch, thread == 0);",
        "plan->workspaces, watch, thread == 0);",
        "test_embed_sanitized.py -k each_with_threads",
    ),
    Bug(
        "callers race for the choice of the instruction set",
        "select.c",
        "__atomic_store_n(&chosen[dtype], find_kernels(row, (fa_dtype)dtype), __ATOMIC_RELEASE);",
        "chosen[dtype] = find_kernels(row, (fa_dtype)dtype);",
        "test_embed_sanitized.py -k many_threads",
    ),
    Bug(
        "a window lets the rest of a vector be seen",
        "rules.inc.h",
        "behind = to / LANES;",
        "behind = (to + LANES - 1) / LANES;",
        "test_truncated.py",
    ),
    Bug(
        "decoding does not rescale what came before",
        "decode.inc.h",
        "v_fill(run->shrink[b * rows + first + r])",
        "v_fill(1)",
        "test_decode.py -k 'sizes or spans'",
    ),
    Bug(
        "a sink has no share of the weights",
        "state.inc.h",
        "share = exp(keys_lse - *lse);",
        "share = 1;",
        "test_dot_product.py",
    ),
    Bug(
        "NaN of a value that is not seen comes through",
        "values.inc.h",
        "if (seen[r].word[j / 64] >> j % 64 & 1)",
        "if (1)",
        "test_hostile.py test_same_bits.py",
    ),
    Bug(
        "the end of a row is read as a whole vector",
        "vector.inc.h",
        "memcpy(&v, p, (size_t)n * sizeof(real));",
        "(void)n, memcpy(&v, p, sizeof v);",
        "test_guard_pages.py",
    ),
    Bug(
        "what rounding takes from a long sum is lost",
        "state.inc.h",
        "error = (before - (now - part)) + (x - part);",
        "error = {0};",
        "test_hostile.py",
    ),
    Bug(
        "a kernel at the far edge reaches outside",
        "contract.h",
        "first = first > n - reach->kernel ? n - reach->kernel : first;",
        "first = first > n ? n : first;",
        "test_neighborhood.py",
    ),
    Bug(
        "a hidden pixel's NaN comes through",
        "neighborhood.inc.h",
        "v = v_pick_bits(scene->seen[r][i], v, (vec){0});",
        "(void)r;",
        "test_neighborhood.py",
    ),
    Bug(
        "rows of keys are overwritten while they are seen",
        "neighborhood.inc.h",
        "flat ? 2 : tile[FA_ALONG_X]",
        "1",
        "test_neighborhood.py",
    ),
    Bug(
        "a key forgets the last query that sees it",
        "neighborhood.inc.h",
        "if (from > i)",
        "if (from >= i)",
        "test_neighborhood_gradients.py -k dimension",
    ),
    Bug(
        "what a pair gives that does not take part",
        "neighborhood_back.inc.h",
        "bits &= ~v_true_bits(v == none);",
        "(void)none;",
        "test_neighborhood_gradients.py -k nothing",
    ),
    Bug(
        "the log-sum-exp has no gradient",
        "neighborhood_back.inc.h",
        "note[FA_NOTE_MEAN] -= v_load(gradients);",
        "(void)gradients;",
        "test_neighborhood_gradients.py -k rules",
    ),
    Bug(
        "heads of a group overwrite each other's gradients",
        "neighborhood_back.inc.h",
        "image->add_key || (head && !image->d_key.head)",
        "image->add_key",
        "test_neighborhood_gradients.py -k grouped",
    ),
    Bug(
        "float16 is rounded half up",
        "storage.inc.h",
        "0xc8000fffu + (u >> 13 & 1u)",
        "0xc8001000u",
        "test_storage.py",
    ),
    Bug(
        "bfloat16 is rounded half up",
        "storage.inc.h",
        "0x7fffu + (u >> 16 & 1u)",
        "0x8000u",
        "test_storage.py",
    ),
    Bug(
        "the last key of a chunk is hidden",
        "contract.h",
        "hi = (last_chunk + 1) * problem->chunk - before;",
        "hi = (last_chunk + 1) * problem->chunk - before - 1;",
        "test_truncated.py",
    ),
    Bug(
        "the log-sum-exp is one of base 2",
        "state.inc.h",
        "(natural_log ? 1 : 0.69314718055994530942)",
        "1",
        "test_dot_product.py",
    ),
    Bug(
        "softmax leaves out what is less than a vector",
        "rows.inc.h",
        "some[i] = x[j + i];",
        "some[i] = -(real)INFINITY;",
        "test_softmax.py",
    ),
    Bug(
        "NaN beside a weight of 0 reaches its row",
        "rows_back.inc.h",
        "return (vec)(counts & (ivec)(plain ? w : w * g));",
        "return plain ? w : w * g;",
        "test_row_gradients.py -k count",
    ),
    Bug(
        "long gradients lose the errors of their sums",
        "rows_back.inc.h",
        "to->rest += (to->sum - (now - part)) + (x - part);",
        "to->rest += (vec){0};",
        "test_row_gradients.py -k long",
    ),
    Bug(
        "parts that saw no key have a gradient",
        "rows_back.inc.h",
        "share[p] == -(real)INFINITY ? NO_SHARE : (real)e",
        "(real)e",
        "test_merge_varlen.py -k zeros",
    ),
    Bug(
        "the last row of a block sees the blocks below",
        "contract.h",
        "blocks->data + fa_query_of(head, i) / problem->block_rows",
        "blocks->data + (fa_query_of(head, i) + 1) / problem->block_rows",
        "test_block_mask.py -k bits",
    ),
    Bug(
        "a threshold stops one step early",
        "threshold.inc.h",
        "step <= other;",
        "1;",
        "test_sparse.py -k 'lengths or sizes'",
    ),
    Bug(
        "a list of scores forgets what a span has brought",
        "sparse.inc.h",
        "sparse->count[r] = before + count;",
        "sparse->count[r] = count;",
        "test_sparse.py -k same_bits",
    ),
    Bug(
        "values of weight 0 take part where many have a weight",
        "sparse.inc.h",
        "if (many && values->finite) {",
        "if (many) {",
        "test_sparse.py -k weight_zero",
    ),
    Bug(
        "a hidden edge's value comes through",
        "edges.inc.h",
        "if (run->hidden[h] >> e & 1)",
        "if (0)",
        "test_graph.py -k seen",
    ),
    Bug(
        "the weights of a long row's earlier edges do not shrink",
        "edges.inc.h",
        "spread_over(run, keep, v)",
        "v_fill(1)",
        "test_graph.py -k lengths",
    ),
    Bug(
        "the gradients of a row's scores are not relative to their mean",
        "edges_back.inc.h",
        "(v_load_fours(a + i) - mean + of_lse)",
        "(v_load_fours(a + i) + of_lse)",
        "test_graph_gradients.py -k options",
    ),
    Bug(
        "a hidden edge gives its query's gradient to a key",
        "edges_back.inc.h",
        "*back->gradients->hidden = 1;",
        "*back->gradients->hidden = 0;",
        "test_graph_gradients.py -k hidden",
    ),
    Bug(
        "edges that share a gradient lose what was rounded off",
        "edges_back.inc.h",
        "(double)back->totals[k].sum[i] + (double)back->totals[k].lost[i]",
        "(double)back->totals[k].sum[i] * 1.00001",
        "test_graph_gradients.py -k options",
    ),
    Bug(
        "grouped heads lie where queries do",
        "contract.h",
        "i % head->heads * matrix->head",
        "i % head->heads * matrix->row",
        "test_dot_product.py test_decode.py -k group",
    ),
    Bug(
        "a state forgets what it should not",
        "linear.inc.h",
        "const unsigned lost = v_true_bits(x == none);\n        s->forgotten",
        "const unsigned lost = v_true_bits(x < 0);\n        s->forgotten",
        "test_linear.py -k rules",
    ),
    Bug(
        "NaN outlives a decay of minus infinity",
        "linear.inc.h",
        "+ t] = lost;\n        s->forgets[t] |= lost != 0;",
        "+ t] = lost;\n        s->forgets[t] = 0;",
        "test_linear.py -k packed",
    ),
    Bug(
        "the delta rule corrects by the state of the token before",
        "linear.inc.h",
        "p[c] = v_fma(next_key, m, p[c]);",
        "p[c] = v_fma(key, m, p[c]);",
        "test_linear.py -k rules",
    ),
    Bug(
        "queries of a group read what is before their key",
        "linear.inc.h",
        "const int64_t begin = h->offset[head] - j,",
        "const int64_t begin = h->offset[0] - j,",
        "test_linear.py -k groups",
    ),
    Bug(
        "on its way back the delta rule takes back what the same token said",
        "linear.inc.h",
        "vec m = v_fma(query_before, taken[c], v_load(m_ + c * LANES)) * decay;",
        "vec m = v_fma(query, taken[c], v_load(m_ + c * LANES)) * decay;",
        "test_linear_gradients.py -k rules",
    ),
    Bug(
        "the gradient of decays goes on from a chunk to the one before",
        "linear_back.inc.h",
        "const int anew = j % b->chunk == 0;",
        "const int anew = j == 0;",
        "test_linear_gradients.py -k chunk",
    ),
    Bug(
        "a denominator has no gradient",
        "linear_back.inc.h",
        "const real share = w ? -dot_of(q, w, n) / below / below : 0;",
        "const real share = w ? 0 * dot_of(q, w, n) : 0;",
        "test_linear_gradients.py -k rules",
    ),
    Bug(
        "additive gradients forget that a key is far",
        "additive_back.inc.h",
        "if (far || !rows_are_clean) {",
        "if (!rows_are_clean) {",
        "test_additive_gradients.py -k far",
    ),
    Bug(
        "additive gradients add what a far row does not see",
        "additive_back.inc.h",
        "const key_bits bits = seen ? seen[r] : bits_of_range(lo, hi);",
        "const key_bits bits = bits_of_range(lo, hi);",
        "test_additive_gradients.py -k hidden",
    ),
    Bug(
        "gradients: a log-sum-exp near -1e9 is taken for exact",
        "gradient.inc.h",
        "again[r] = (char)far;",
        "again[r] = 0;",
        "test_gradients.py -k 'sum_to_one or one_level'",
    ),
    Bug(
        "gradients: NaN of a value that is not seen comes through",
        "gradient.inc.h",
        "v_store(dp + v * LANES, v_pick(x == none, (vec){0}, p * (v_load(dp + v * LANES) - delta)));",
        "v_store(dp + v * LANES, p * (v_load(dp + v * LANES) - delta)), (void)none;",
        "test_gradients.py -k 'unseen_keys and softmax'",
    ),
    Bug(
        "gradients: that of the log-sum-exp is left out",
        "gradient.inc.h",
        "state[STATE_DELTA] = (real)((double)delta - grad_lse);",
        "state[STATE_DELTA] = delta;",
        "test_gradients.py -k 'test_rules and dot_product and mask'",
    ),
    Bug(
        "gradients: the slope of entmax15 is that of sparsemax",
        "gradient.inc.h",
        "return square ? d : v_pick(",
        "return v_pick(",
        "test_gradients.py -k 'test_rules and dot_product and entmax15'",
    ),
    Bug(
        "gradients: all rows of a group have the distances of its first",
        "gradient.inc.h",
        "const real distance = (real)(back->block - position);",
        "const real distance = (real)(back->block - position + r);",
        "test_gradients.py -k 'test_rules and dot_product and alibi'",
    ),
    Bug(
        "gradients: a bias by distance is added up by key",
        "gradient.inc.h",
        "real *d = back->diagonal + (FA_BACK_ROWS - 1 - (i - back->tile.row));",
        "real *d = back->diagonal + (FA_BACK_ROWS - 1);",
        "test_gradients.py -k 'shapes_of_relative_bias'",
    ),
    Bug(
        "gradients: what rounding takes from a long sum is lost",
        "gradient.inc.h",
        "            if (sums->has_lost)\n                x += v_load(sums->lost + j * sums->row + c);",
        "",
        "test_gradients.py -k 'drift'",
    ),
    Bug(
        "gradients: rows with fewer keys keep what the tile before had there",
        "gradient.inc.h",
        "            for (int j = last * LANES; j < back->last * LANES + 16; j++)\n                s[j] = dp[j] = 0;",
        "",
        "test_gradients.py -k 'test_sizes and True'",
    ),
    Bug(
        "every exponential is taken twice",
        "softmax.inc.h",
        "const vec p = v_exp2(natural_log ? x * log2e : x);",
        "const vec y = natural_log ? x * log2e : x, p = v_max(v_exp2(y), v_exp2(y - 1));",
        COUNTS,
    ),
    Bug(
        "a block of keys is packed for each group of rows",
        "prefill.inc.h",
        "packed = 1;",
        "packed = 0;",
        COUNTS,
    ),
    Bug(
        "from C: a workspace that is too small is taken",
        "embed.c",
        "workspace_size < c.size ||",
        "workspace_size + 64 < c.size ||",
        "test_embedding.py -k test_workspace",
    ),
    Bug(
        "from C: heads of a group lie where heads of their own would",
        "embed.c",
        "of_keys ? view->head : view->head * call->group;",
        "view->head;",
        "test_embedding.py -k test_bits_of_every_rule",
    ),
    Bug(
        "from C: slopes and sinks are not rounded",
        "embed.c",
        "x : (double)(float)x;",
        "x : x;",
        "test_embedding.py -k test_numbers_per_head",
    ),
    Bug(
        "from C: arrays that share no byte overlap",
        "embed.c",
        "return can_be(terms, most, divisor, count, sum, &effort);",
        "return 1;",
        "test_embedding.py -k test_overlap",
    ),
)


def replaced(path, right, wrong, name):
    """The text of a file with the one occurrence replaced; exits if there is not exactly one."""
    with open(path) as file:
        text = file.read()
    if text.count(right) != 1:
        sys.exit(
            f"{name!r} no longer applies: {os.path.basename(path)} has {text.count(right)} places with\n    {right}\n"
            "Look where that line is now, and write it into tests/planted_bugs.py."
        )
    return text.replace(right, wrong)


class Copy:
    """A built copy of the tree, in which kernels can be changed."""

    def __init__(self, folder):
        self.folder = folder
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "_*.c", "attention.c", *OTHER_KERNELS)
        for part in PARTS:
            source, copy = os.path.join(ROOT, part), os.path.join(folder, part)
            if os.path.isdir(source):
                shutil.copytree(source, copy, ignore=ignored)
            else:
                os.makedirs(os.path.dirname(copy), exist_ok=True)
                shutil.copy(source, copy)
        for file, right, wrong in SETTINGS:
            with open(os.path.join(folder, file)) as stream:
                text = stream.read()
            if right not in text:
                sys.exit(f"{file} does not say {right} any more: see SETTINGS in tests/planted_bugs.py")
            self.write(file, text.replace(right, wrong))
        self.environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        self.environment.pop("FASTATTN_ISA", None)
        output = self.run([sys.executable, "setup.py", "build_ext", "--inplace"])
        # C files are rebuilt with the command lines of this build.
        found = (re.search(r" -c \S*fastattn/kernels/(\w+\.c) ", line) for line in output.splitlines())
        self.compiling = {match[1]: shlex.split(match.string) for match in found if match}
        linking = [
            shlex.split(line)
            for line in output.splitlines()
            if "fastattn/kernels/baseline_" in line and " -shared " in line
        ]
        self.kernels = [name for name in self.compiling if name.startswith("baseline_")]
        if len(self.kernels) != 2 or len(linking) != 1:
            sys.exit(f"no commands to build the kernels with in\n{output}")
        self.linking = linking[0]
        self.library = self.linking[self.linking.index("-o") + 1]
        info = self.run([sys.executable, "-m", "fastattn", "--info"])
        where = self.run([sys.executable, "-c", "import fastattn; print(fastattn.__file__)"])
        if "runnable: baseline)" not in info or not os.path.realpath(where).startswith(os.path.realpath(folder)):
            sys.exit(f"the copy is not what runs there, or has other kernels:\n{where}{info}")

    def write(self, file, text):
        with open(os.path.join(self.folder, file), "w") as stream:
            stream.write(text)

    def run(self, command):
        """The output of a command that must succeed."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            sys.exit(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout[-5000:]}")
        return done.stdout

    def build(self, file):
        """Rebuild what a kernel file is in: a header in the kernels, a C file alone."""
        for name in [file] if file.endswith(".c") else self.kernels:
            self.run(self.compiling[name])
        self.run(self.linking)
        shutil.copy(os.path.join(self.folder, self.library), os.path.join(self.folder, "fastattn"))

    def test(self, arguments):
        """The exit status and output of pytest, or of the comparison with the counts of the kernels without a bug."""
        if arguments == [COUNTS]:
            if not os.path.exists(os.path.join(self.folder, COUNTS[:-2] + "json")):
                self.run([sys.executable, COUNTS, "--update"])
            command = [COUNTS]
        else:
            words = [f"tests/{word}" if word.startswith("test_") and ".py" in word else word for word in arguments]
            command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words]
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout


def verdict(returncode, output):
    """Whether the tests found the bug, and a message about it."""
    failed = re.search(r"^(?:FAILED tests/|    (?=.*\d -> \d))(.+?)( - .*)?$", output, re.MULTILINE)
    if returncode == 1 and failed:
        return True, failed[1]
    if returncode == 0:
        return False, "SURVIVED"
    if returncode < 0:
        return False, f"pytest itself ended by {signal.Signals(-returncode).name}"
    return False, f"pytest could not run (exit status {returncode}):\n{output[-3000:]}"


def main(words):
    chosen = [bug for bug in BUGS if not words or any(word in bug.name for word in words)]
    if not chosen:
        sys.exit(f"no bug has a name with {' or '.join(words)} in it; there are:\n" + "\n".join(b.name for b in BUGS))
    if shutil.which("valgrind") is None:
        print("without valgrind no slowdowns are planted")
        chosen = [bug for bug in chosen if bug.tests != COUNTS]
    texts = [replaced(os.path.join(ROOT, "fastattn", "kernels", b.file), b.right, b.wrong, b.name) for b in chosen]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        copy = Copy(folder)
        print(f"built in {time.monotonic() - begin:.0f} s; the tests without a bug:", flush=True)
        for arguments in sorted({bug.tests for bug in chosen}):
            returncode, output = copy.test(shlex.split(arguments))
            if returncode:
                sys.exit(f"red without any bug: {arguments}\n{output[-5000:]}")
            print(f"  {arguments}: {output.splitlines()[-1]}", flush=True)
        found = 0
        width = max(len(bug.name) for bug in chosen)
        for bug, text in zip(chosen, texts, strict=True):
            begin = time.monotonic()
            path = os.path.join(folder, "fastattn", "kernels", bug.file)
            with open(path) as stream:
                right = stream.read()
            copy.write(path, text)
            copy.build(bug.file)
            red, what = verdict(*copy.test(shlex.split(bug.tests)))
            copy.write(path, right)
            if bug.file.endswith(".c"):
                copy.run(copy.compiling[bug.file])  # the next bug may be a header's
            found += red
            seconds = time.monotonic() - begin
            print(f"{'red' if red else 'NOT'}  {bug.name:{width}}  {bug.file:20}  {seconds:3.0f} s  {what}", flush=True)
    print(f"{found} of {len(chosen)} planted bugs were found")
    return 0 if found == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
