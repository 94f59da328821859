// One instruction set's table of functions. Included by isa_*.cpp inside namespace lmc::<isa>, after the solvers.

template <class T>
const Solvers<T>& table() {
    static constexpr Solvers<T> functions = {
        ISA_NAME,      cayley_work<T>, cayley_forward<T>, cayley_backward<T>, expm_work<T>,
        expm_tape<T>,  one_norm<T>,    expm_forward<T>,   expm_backward<T>,
    };
    return functions;
}
template const Solvers<float>& table<float>();
template const Solvers<double>& table<double>();
